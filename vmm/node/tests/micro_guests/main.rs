//! Guests of a few instructions on the real KVM: one behaviour of the vCPU threads each.
//!
//! They run in real mode, where an interrupt table is four bytes a vector and no page tables are needed. On a
//! host without KVM every test says that it is skipped.

mod asm;
mod clock;
mod harness;
mod interrupts;
mod nodes;
mod startup;
mod vcpu;
