//! Messages between nodes on lane 0, from any bytes: one that decodes encodes to the same bytes.
#![no_main]
use vmm::node_msg::NodeMsg;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(message) = NodeMsg::decode(data) {
        assert_eq!(message.encode().as_bytes(), data);
    }
});
