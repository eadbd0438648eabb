//! The testbed: hosts to run `gestalt` on, on any x86-64 machine.
//!
//! A machine with VMX or SVM is a host itself. On one without, hosts are emulated: QEMU's TCG emulates AMD's
//! SVM, and inside runs Debian 13 with a real KVM and real userfaultfd. When asked for, Bochs emulates one
//! with Intel's VMX. Either way a test sees the same [`host::Host`], which runs jobs, and
//! [`rig::Rig::emulated`] says which it was.
//!
//! - [`rig`] puts a whole run together; start there.
//! - [`boot`] runs one boot of a [`machine`] and says what came of it; [`verdict`] judges it.
//! - [`stale`] tells the emulator's own fault apart, [`emulator`] proves it, [`keeper`] makes it rare.
//! - [`host`] runs jobs on a host, through [`proto`], against an [`agent`].
//! - [`rack`] is the emulated hosts: [`qemu`] one of them, [`switch`] their network, [`image`] what they
//!   boot. [`bochs`] is an emulated host with an Intel processor, or another AMD one.
//! - [`terminal`] lends our terminal to a job. [`stage`] is the directory that all hosts see.
//! - [`debian`] is a disk with a whole Debian on it, [`login`] the way into a guest that booted it.
//! - [`kernels`] with their [`drivers`] and [`guest`] are what guests boot; [`report`] reads what a guest
//!   says.
//! - [`artifacts`] builds the programs under test, [`setup`] installs packages, [`apt`] fetches single ones,
//!   [`archive`] writes initramfs images, [`cache`] keeps what is slow to make, [`exec`] runs commands that
//!   cannot outlive us, [`progress`] shows long steps, [`probe`] tells whether emulation is needed.
//!
//! # The path of one job on an emulated host
//!
//! ```text
//! Host::spawn -> proto over a socket pair -> QEMU's virtio-serial port -> `testbed agent` (child of process 1)
//!   -> the job in a session of its own -> its output back the same way -> Job::next_until
//! ```

pub mod agent;
pub mod apt;
pub mod archive;
pub mod artifacts;
pub mod bochs;
pub mod boot;
pub mod cache;
pub mod debian;
mod devices;
pub mod drivers;
pub mod emulator;
pub mod exec;
pub mod guest;
pub mod host;
pub mod image;
pub mod keeper;
pub mod kernels;
pub mod login;
pub mod machine;
pub mod options;
pub mod probe;
pub mod progress;
pub mod proto;
pub mod qemu;
pub mod rack;
pub mod report;
pub mod rig;
pub mod setup;
pub mod stage;
pub mod stale;
pub mod switch;
pub mod terminal;
pub mod verdict;
