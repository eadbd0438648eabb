//! Anybody's bytes to the fabric's listener: no stranger gets a lane.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::handshake(data));
