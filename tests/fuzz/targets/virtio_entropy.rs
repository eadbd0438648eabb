//! A driver that may do anything, and the entropy device.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::virtio::fuzzing::entropy(data));
