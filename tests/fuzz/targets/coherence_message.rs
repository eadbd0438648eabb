//! Coherence messages, from any bytes: refused, or about a page that the guest has.
#![no_main]
use coherence::protocol::Message;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok((message, _)) = Message::parse(data, 5, 1 << 20) {
        assert!(message.page.0 < 1 << 20);
    }
});
