//! The byte stream that RDMA messages carry, in messages of any size, against the same as one message.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fabric::fuzzing::rdma_stream(data));
