//! Any bytes as a qcow2 image, and a guest that reads, writes and clears anywhere in it.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    devices::virtio::block::qcow2::fuzzing::image(data);
});
