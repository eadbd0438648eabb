//! Interrupts and device accesses between nodes: one message has one form.
#![no_main]
use vmm::node_msg::NodeMsg;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(message) = NodeMsg::decode(data) {
        assert_eq!(message.encode().as_bytes(), data);
    }
});
