//! The cost of the fabric beside the least that can move the same bytes, in the same run.
//!
//! ```text
//!   near thread (one CPU)                          far thread (another CPU)
//!   End::send ─── fabric, or a bare socket or channel ───> End::receive
//! ```
//!
//! - [`end`]: one end of a connection, ours or the floor's.
//! - [`measure`]: round trips, one way, many under way.
//! - [`rails`]: two rails beside one, each slower than what the CPUs can send.
//! - [`plan`]: which transports, which operations, which goals.

pub mod end;
pub mod measure;
pub mod plan;
pub mod rails;
