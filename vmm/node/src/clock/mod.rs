//! One time stamp counter for the whole machine.
//!
//! Every node's guest TSC is its host's TSC, scaled to the machine's frequency, plus one offset that all the
//! node's vCPUs share. Host TSCs of different servers start anywhere and drift apart by some parts per
//! million, so nodes measure and correct, at start and for as long as the machine runs:
//!
//! ```text
//!   node i                                node 0
//!     t1 ──── ClockPing(t1) ────────────────> t2
//!     t4 <─── ClockPong(t1, t2, t3, offset) ─ t3        t1, t4: host i;  t2, t3: host 0
//!      │
//!   Estimator: host 0 - host i lies in [t3 - t4, t2 - t1], whatever the delays were;
//!      │       intervals of many rounds intersect, and widen by the possible drift in between
//!      ▼
//!   Aligner: behind node 0?  step this node's offset forward
//!            ahead of it?    tell node 0 the offset it needs (ClockAhead); it steps, the others follow
//! ```
//!
//! Steps go forward only, so that no CPU ever sees time go back: the machine's clock is its fastest node's.
//! The remaining skew is at most half the round trip of the quickest ping: less than any message takes there
//! and back, so effects never seem to precede causes.
//!
//! | file | concept |
//! |---|---|
//! | [`scale`] | the frequency ratio that KVM applies |
//! | [`estimator`] | pure: rounds in, interval of the difference out |
//! | [`align`] | pure: what to do about the difference |
//! | [`guest`] | the node's guest TSC, and how a step reaches its vCPUs |
//! | [`thread`] | the thread that measures |

pub mod align;
pub mod estimator;
pub mod guest;
pub mod scale;
pub mod thread;

pub use guest::GuestClock;
pub use scale::Scale;
