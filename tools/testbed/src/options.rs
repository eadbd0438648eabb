//! Values that command lines of the testbed and its tasks have in common.

use clap::ValueEnum;

use crate::bochs::Processor;
use crate::rig::Emulator;

/// What to emulate.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulate {
    /// Hosts with AMD's SVM, by QEMU.
    Amd,
    /// One host with Intel's VMX, by Bochs.
    Intel,
    /// One host with AMD's SVM, by Bochs: what Intel's compares with.
    BochsAmd,
}

impl Emulate {
    /// What does it; `accessed_dirty` says whether EPT, on an Intel host, keeps accessed and dirty bits.
    pub fn emulator(self, accessed_dirty: bool) -> Emulator {
        match self {
            Self::Amd => Emulator::Qemu,
            Self::Intel => Emulator::Bochs(Processor::Intel { accessed_dirty }),
            Self::BochsAmd => Emulator::Bochs(Processor::Amd),
        }
    }
}
