//! A lane over several rails whose peer says anything on any of them.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::rails(data));
