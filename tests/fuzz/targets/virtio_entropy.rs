//! A driver that may do anything, and the entropy device.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| devices::virtio::fuzzing::entropy(data));
