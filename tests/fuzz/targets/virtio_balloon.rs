//! A driver that may do anything, and a balloon.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| devices::virtio::fuzzing::balloon(data));
