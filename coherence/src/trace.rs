//! The events that coherence writes to the node's trace.

pub use base::trace::event;

base::events! {
    /// A shard's thread began.
    ShardThread = "lane, 0",
    /// A userfaultfd event was read.
    Fault = "page, flags (1 write, 2 wp, 4 minor)",
    /// A page was mapped in the guest view.
    Install = "page, rights (0 overwritten by a device, 1 shared, 2 exclusive)",
    /// A page was write-protected in the guest view.
    Downgrade = "page, 0",
    /// A page was unmapped from the guest view.
    Unmap = "page, 0",
    /// A coherence message was sent.
    Send = "page, kind << 16 | peer",
    /// A coherence message was received.
    Receive = "page, kind << 16 | peer",
    /// A demand waits until the page's hold ends.
    Defer = "page, kind << 16 | peer",
}
