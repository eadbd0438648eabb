//! The notes by which nodes set RDMA connections up: one note has one form.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::rdma_note(data));
