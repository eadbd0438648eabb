//! The fabric's byte stream, in pieces of any size, against a decoder that sees it whole.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::frames(data));
