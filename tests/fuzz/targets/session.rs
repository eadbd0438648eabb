//! A peer that has proven its identity, and sends valid frames, repeated ones, and anything else.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::session(data));
