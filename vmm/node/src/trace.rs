//! The events that the node writes to its trace, beside those of coherence.

pub use base::trace::{dump, event, now};

base::events! {
    /// A vCPU's thread began.
    VcpuThread = "vcpu, 0",
    /// The thread of the control lane began.
    ControlThread = "0, 0",
    /// A vCPU left the guest.
    Exit = "vcpu << 32 | reason, detail",
    /// An interrupt was put into a vCPU.
    Inject = "vcpu, vector",
    /// An interprocessor interrupt was sent.
    Ipi = "from vcpu, icr",
    /// An interrupt or signal arrived for a vCPU.
    Post = "vcpu, vector or 0x100 nmi, 0x200 init, 0x300 sipi",
    /// A control message was sent.
    ControlSend = "kind, peer",
    /// A control message was received.
    ControlReceive = "kind, peer",
    /// The guest TSC was stepped.
    ClockStep = "ticks, bound",
}
