//! The notes by which nodes set RDMA connections up, from any bytes: one that decodes encodes to the same
//! bytes.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::rdma_note(data));
