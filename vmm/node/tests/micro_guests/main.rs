//! Guests of a few instructions on the real KVM: one behaviour of the vCPU threads each.
//!
//! They run in real mode, where an interrupt table is four bytes a vector and no page tables are needed;
//! those that wait for pages run at CPL 3 in 64-bit mode, where every KVM runs code natively. On a host
//! without KVM every test says that it is skipped.

mod clock;
mod harness;
mod interrupts;
mod nodes;
mod shipped;
mod shipping;
mod startup;
mod user;
mod vcpu;
mod waiting;
