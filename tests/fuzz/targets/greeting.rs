//! The fabric's greeting: what decodes is what was encoded, byte by byte.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::greeting(data));
