//! Rate limits at work: how a device is held to the requests and bytes that [`machine::config::limits`]
//! allows it.
//!
//! ```text
//!  worker ── admit(bytes) ──> Limiter ── its bucket has room? ── and its part of the pool? ── yes ──> it is done
//!                                └─ no: the worker sleeps, the guest's queue fills up <─ no ┘
//! ```
//!
//! | file | concept |
//! |---|---|
//! | [`bucket`] | how long to wait for a rate to be kept: a pure state machine |
//! | [`limiter`] | the threads that wait |
//! | [`split`] | how devices split a rate by their shares: a pure state machine |
//! | [`pool`] | the devices of a node that do so |
//!
//! A request is held back before it touches its backend, so a limit costs the guest time and never an error.
//! A disk has one limiter for all its queues: each request counts once, with the bytes that it reads or
//! writes. A network card has one for each direction: each packet counts once, up to 64 KiB of one that the
//! host has yet to cut.

pub mod bucket;
pub mod limiter;
pub mod pool;
pub mod split;

pub use self::limiter::Limiter;
pub use self::pool::Pool;
