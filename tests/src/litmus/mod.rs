//! Litmus tests: a few loads and stores on two or more CPUs, run again and again, and which outcomes were
//! seen.
//!
//! An *iteration* runs each thread's accesses once on variables of its own (`x` and `y`, both 0 before), at
//! the same time by the time stamp counter, give or take a little. What the loads read and what the variables
//! hold in the end is the outcome. x86-TSO (Owens, Sarkar and Sewell, 2009) says which outcomes can be.
//!
//! The threads are vCPUs of real KVM that run at CPL 3, all of one node, or each of a node of its own with
//! coherence engines between them: there the outcomes must be those of one machine.
//!
//! - [`catalogue`]: the tests, and what TSO says of them.
//! - [`code`]: their machine code.
//! - [`guest`]: a virtual machine for a node, and vCPUs that begin at CPL 3.
//! - [`ship`]: what they do with pages that are delegated.
//! - [`run`]: iterations, and outcomes counted.

pub mod catalogue;
pub mod code;
pub mod guest;
pub mod run;
pub mod ship;
