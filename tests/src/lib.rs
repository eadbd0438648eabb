//! Tests that cross crates: litmus, boot, chaos. There are none in this crate yet. Engines of several nodes are
//! tested in `coherence/tests`, micro-guests on real KVM in `vmm/tests`, guest boots by `cargo xtask test`.
