//! CPUs that operate on one byte of a page, at their own node or by shipping. Each operation must happen
//! exactly once, between its beginning and its end, on the last write, and its CPU must get the byte that the
//! operation found.
//!
//! ```text
//!  begin ── the page is here ─────────────────────────────────────> done
//!    └──> waiting ── the page comes ──────────────────────────────> done
//!             │ Effect::Ship
//!             ▼            operate             carried out, answered
//!          called ───────────────────> sent ──────────────────────> done
//!             │  ▲ Effect::Ship          │ refused
//!             ▼  │                       ▼
//!          waiting, for the page <── waiting
//!          itself if it cannot be shipped
//! ```

use fabric::NodeId;

use super::{Again, Broken, Cluster, Seen, Step, need};
use crate::page::Page;
use crate::protocol::{Action, Bits, Effect, Operation, Width};

/// How many values the byte of a page takes before it begins again: enough to see one operation too many or
/// too few, and few enough states.
pub const VALUES: u8 = 4;

/// A CPU with an operation under way.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Cpu {
    number: u32,
    pub(super) page: Page,
    write: bool,
    stage: Stage,
}

/// How far it is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stage {
    /// In a fault, which may be shipped or not.
    Waiting { may_ship: bool },
    /// Out of it, to decide.
    Called,
    /// Waiting for the answer; with what the byte was if the operation was carried out.
    Sent { found: Option<u8> },
}

/// What CPUs do with the byte: they add one, so that it wraps at [`VALUES`] (of a byte's high bits), or read
/// it.
fn operation(write: bool) -> Operation {
    let (action, operand) = if write { (Action::Add, u128::from(STEP)) } else { (Action::Load, 0) };
    Operation::new(action, Width::One, 0, operand, 0).expect("it is valid")
}

/// One, in the bits of the byte that are used.
const STEP: u8 = (256 / VALUES as u16) as u8;

impl Cluster {
    /// Whether this CPU has an operation under way.
    pub fn is_operating(&self, node: usize, cpu: u32) -> bool {
        self.find(node, cpu).is_some()
    }

    /// CPUs that were called out of their wait, and what they may do.
    pub(super) fn called(&self) -> impl Iterator<Item = Step> {
        let cpus =
            self.cpus.iter().enumerate().flat_map(|(node, cpus)| cpus.iter().map(move |cpu| (node, cpu)));
        cpus.filter(|(_, cpu)| cpu.stage == Stage::Called).flat_map(|(node, cpu)| {
            let cpu = cpu.number;
            [Step::Move { node, cpu }, Step::Ship { node, cpu }]
        })
    }

    fn find(&self, node: usize, cpu: u32) -> Option<usize> {
        self.cpus[node].binary_search_by_key(&cpu, |cpu| cpu.number).ok()
    }

    /// Begins an operation; whether the node has faulted.
    pub(super) fn begin_operation(
        &mut self,
        node: usize,
        cpu: u32,
        page: Page,
        write: bool,
        out: &mut Vec<Effect>,
        seen: &mut Vec<Seen>,
    ) -> Result<bool, Broken> {
        let Err(at) = self.cpus[node].binary_search_by_key(&cpu, |cpu| cpu.number) else { return Ok(false) };
        let stage = Stage::Waiting { may_ship: true };
        self.cpus[node].insert(at, Cpu { number: cpu, page, write, stage });
        if self.mapped(node, page) >= need(write) {
            self.operate_here(node, at, seen)?;
            return Ok(false);
        }
        self.fault_again(node, cpu, out);
        Ok(true)
    }

    /// The CPU faults, for the first time or once more.
    pub(super) fn fault_again(&mut self, node: usize, cpu: u32, out: &mut Vec<Effect>) {
        let Some(at) = self.find(node, cpu) else { return };
        let Cpu { page, write, stage, .. } = self.cpus[node][at];
        match stage {
            Stage::Waiting { may_ship: true } => self.nodes[node].fault_may_ship(page, write, out),
            _ => self.nodes[node].fault(page, write, out),
        }
    }

    /// The page is here as the CPU needs it: it does what it wants.
    fn operate_here(&mut self, node: usize, at: usize, seen: &mut Vec<Seen>) -> Result<(), Broken> {
        let Cpu { number: cpu, page, write, .. } = self.cpus[node].remove(at);
        let old = self.change(node, page, operation(write))?;
        seen.push(Seen::Operated { node, cpu, page, old, shipped: false });
        Ok(())
    }

    /// What the byte was, and is no more if the operation writes.
    fn change(&mut self, node: usize, page: Page, operation: Operation) -> Result<u8, Broken> {
        self.check_current(node, page)?;
        self.untouched[page.0 as usize] = false;
        let old = self.copies[self.at(node, page)].value;
        if let Some(new) = operation.result(old.into()) {
            self.copy(node, page).value = new as u8;
            self.written(node, page);
        }
        Ok(old)
    }

    /// A mapping changed, and CPUs in their faults are woken.
    pub(super) fn woken_operations(
        &mut self,
        node: usize,
        page: Page,
        seen: &mut Vec<Seen>,
        again: &mut Vec<Again>,
    ) -> Result<(), Broken> {
        let mut at = 0;
        while let Some(&cpu) = self.cpus[node].get(at) {
            let waits = cpu.page == page && matches!(cpu.stage, Stage::Waiting { .. });
            if waits && self.mapped(node, page) >= need(cpu.write) {
                self.operate_here(node, at, seen)?;
                continue;
            }
            if waits {
                again.push(Again::Operation(cpu.number));
            }
            at += 1;
        }
        Ok(())
    }

    /// [`Effect::Ship`]: CPUs that may be are called out of their waits.
    pub(super) fn call_out(&mut self, node: usize, page: Page, seen: &mut Vec<Seen>) {
        let waits = |cpu: &&mut Cpu| cpu.page == page && cpu.stage == Stage::Waiting { may_ship: true };
        for cpu in self.cpus[node].iter_mut().filter(waits) {
            cpu.stage = Stage::Called;
            seen.push(Seen::Called { node, cpu: cpu.number });
        }
    }

    /// A CPU that was called out ships; whether the protocol has anything to do.
    pub(super) fn ship(
        &mut self,
        node: usize,
        cpu: u32,
        out: &mut Vec<Effect>,
        seen: &mut Vec<Seen>,
    ) -> Result<bool, Broken> {
        let Some(at) = self.find(node, cpu) else { return Ok(false) };
        let Cpu { page, write, stage, .. } = self.cpus[node][at];
        if stage != Stage::Called {
            return Ok(false);
        }
        // Before, so that an answer that comes at once finds it.
        self.cpus[node][at].stage = Stage::Sent { found: None };
        if !self.nodes[node].operate(page, cpu, operation(write), out) {
            self.cpus[node][at].stage = Stage::Waiting { may_ship: true };
            if self.mapped(node, page) >= need(write) {
                self.operate_here(node, at, seen)?;
                return Ok(false);
            }
            self.fault_again(node, cpu, out);
        }
        Ok(true)
    }

    /// A CPU that was called out needs the page itself; whether it was to decide.
    pub(super) fn move_instead(&mut self, node: usize, cpu: u32, out: &mut Vec<Effect>) -> bool {
        let at = self.find(node, cpu).filter(|&at| self.cpus[node][at].stage == Stage::Called);
        if let Some(at) = at {
            self.cpus[node][at].stage = Stage::Waiting { may_ship: false };
            self.fault_again(node, cpu, out);
        }
        at.is_some()
    }

    /// [`Effect::Operate`]: the byte before.
    pub(super) fn carry_out(
        &mut self,
        node: usize,
        page: Page,
        by: NodeId,
        cpu: u32,
        operation: Operation,
    ) -> Result<Bits, Broken> {
        let not_asked = Broken::NotAsked(by.index(), cpu, page);
        let Some(at) = self.find(by.index(), cpu) else { return Err(not_asked) };
        if self.cpus[by.index()][at].page != page
            || self.cpus[by.index()][at].stage != (Stage::Sent { found: None })
        {
            return Err(not_asked);
        }
        let others = self.of_page(page).iter().enumerate();
        let readers = others.filter(|(n, copy)| *n != node && copy.mapped != Default::default()).count();
        if readers > 0 {
            return Err(Broken::TwoWriters(page, 1, readers));
        }
        let old = self.change(node, page, operation)?;
        self.cpus[by.index()][at].stage = Stage::Sent { found: Some(old) };
        Ok(u128::from(old).into())
    }

    /// [`Effect::Operated`]; whether the CPU is to fault again.
    pub(super) fn end_operation(
        &mut self,
        node: usize,
        page: Page,
        cpu: u32,
        old: Option<Bits>,
        seen: &mut Vec<Seen>,
    ) -> Result<bool, Broken> {
        let wrong = Broken::WrongAnswer(node, cpu, page);
        let Some(at) = self.find(node, cpu).filter(|&at| self.cpus[node][at].page == page) else {
            return Err(wrong);
        };
        match (self.cpus[node][at].stage, old) {
            (Stage::Sent { found: Some(found) }, Some(old)) if u128::from(old) == u128::from(found) => {
                self.cpus[node].remove(at);
                seen.push(Seen::Operated { node, cpu, page, old: found, shipped: true });
                Ok(false)
            }
            (Stage::Sent { found: None }, None) => {
                self.cpus[node][at].stage = Stage::Waiting { may_ship: true };
                seen.push(Seen::Refused { node, cpu });
                Ok(true)
            }
            _ => Err(wrong),
        }
    }
}
