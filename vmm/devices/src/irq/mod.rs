//! The guest's interrupt controllers: pure state machines, no KVM, no threads, no clock.
//!
//! | file | concept |
//! |---|---|
//! | [`lapic`] | one x2APIC per vCPU: registers, priorities, EOI, inter-processor interrupts |
//! | [`timer`] | the local APIC's timer: one-shot, periodic and TSC-deadline |
//! | [`ioapic`] | the 24-pin I/O APIC |
//! | [`msi`] | message-signalled interrupts, decoded |
//! | [`route`] | which CPUs a destination means |
//! | [`vectors`] | a set of interrupt vectors |
//!
//! The way of one inter-processor interrupt: the guest writes the ICR, KVM exits, the vCPU's thread calls
//! [`lapic::Lapic::write_msr`] and gets [`Effect::Ipi`]; the node's router asks [`route::resolve`] for the
//! CPUs and hands each either to a local vCPU's mailbox or to the fabric. The receiving vCPU's thread calls
//! [`lapic::Lapic::post`], and before it enters the guest again [`lapic::Lapic::acknowledge`] gives the
//! vector to inject.
//!
//! ```text
//!   device line -> IoApic::set_pin --\
//!   device MSI  -> msi::decode -------+-> Message -> route::resolve -> Lapic::post -> IRR
//!   ICR write   -> Lapic::write_msr -/                                                 | acknowledge
//!                                                                                      v
//!   IoApic::eoi <- Effect::Eoi (level-triggered vectors only) <- EOI register write <- ISR
//! ```

pub mod ioapic;
pub mod lapic;
pub mod msi;
pub mod route;
pub mod timer;
pub mod vectors;

use serde::{Deserialize, Serialize};

/// Which CPUs an interrupt is meant for. APIC ids are cluster-wide x2APIC ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// The one CPU with this x2APIC id.
    Physical(u32),
    /// The CPUs of one cluster: bits 31..16 are the cluster (id bits 19..4), bits 15..0 a mask over id bits
    /// 3..0 (SDM vol. 3, 11.12.10.2).
    Logical(u32),
    /// Every CPU, the sender too.
    All,
    /// Every CPU but the sender.
    AllButSelf,
}

/// What arrives at the CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// An interrupt vector for every CPU of the destination: [`lapic::Lapic::post`].
    Fixed {
        /// The vector, 16..=255 (the receiver refuses lower ones and notes the error).
        vector: u8,
        /// Level-triggered: its EOI must reach the I/O APIC.
        level: bool,
    },
    /// An interrupt vector for one CPU of the destination, the choice is [`route::resolve`]'s.
    LowestPriority {
        /// The vector, 16..=255.
        vector: u8,
        /// Level-triggered: its EOI must reach the I/O APIC.
        level: bool,
    },
    /// A non-maskable interrupt.
    Nmi,
    /// INIT: the CPU is reset ([`lapic::Lapic::init_reset`]) and waits for a start-up message.
    Init,
    /// Start-up: a CPU that waits after INIT begins in real mode at `vector << 12`; any other CPU ignores it.
    Sipi {
        /// The page number of the entry point.
        vector: u8,
    },
}

/// An interrupt from a device, to be routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who gets it.
    pub dest: Destination,
    /// What they get.
    pub mode: Mode,
}

/// An interrupt from a CPU to others (or to itself), to be routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipi {
    /// Who gets it.
    pub dest: Destination,
    /// What they get.
    pub mode: Mode,
    /// The sender's x2APIC id.
    pub from: u32,
}

/// What the vCPU's thread has to do after a register write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Route this interrupt.
    Ipi(Ipi),
    /// A level-triggered interrupt was finished: tell the I/O APIC ([`ioapic::IoApic::eoi`]).
    Eoi {
        /// The finished vector.
        vector: u8,
    },
    /// [`lapic::Lapic::timer_deadline`] may have changed: arm the host's timer again.
    TimerChanged,
}

/// The access must raise a general-protection fault in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest accessed an interrupt-controller register in a way that the architecture forbids: inject #GP(0)"
)]
pub struct Gp;
