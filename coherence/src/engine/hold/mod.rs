//! Holds: pages that a node just won are kept until those that wanted them have got on.
//!
//! - [`policy`]: for how long, by thread; shared by a node's shards.
//! - [`held`]: a shard's waiting threads and held pages.
//!
//! Both are pure: times and CPU times come from the caller, so that tests drive them in virtual time (`simulation`) and
//! through all their interleavings (`progress`).

pub mod held;
pub mod policy;
#[cfg(test)]
mod progress;
#[cfg(test)]
mod simulation;

pub use held::Holds;
pub use policy::{Claim, HoldPolicy};
