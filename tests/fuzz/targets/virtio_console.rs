//! A driver that may do anything, and a console or channel.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| devices::virtio::fuzzing::console(data));
