//! An operation on a few bytes of one page: what a shipped instruction does to memory, and nothing else of
//! it.
//!
//! The set is small, because who asks gets the old bytes and computes registers and flags from them:
//!
//! | instruction | action |
//! |---|---|
//! | `mov` from memory, `movzx`, `movsx`, `cmp`, `test`, `bt` | [`Action::Load`] |
//! | `mov` to memory | [`Action::Store`] |
//! | `xchg` | [`Action::Exchange`] |
//! | `cmpxchg`, `cmpxchg8b`, `cmpxchg16b` | [`Action::CompareExchange`] |
//! | `xadd`, `add`, `sub`, `inc`, `dec`, `adc`, `sbb` | [`Action::Add`], of what is subtracted negated, the carry included |
//! | `and`, `or`, `xor`, `not`, `btr`, `bts`, `btc` | [`Action::And`], [`Action::Or`], [`Action::Xor`] with a mask |
//! | `neg` | [`Action::Negate`] |
//!
//! Each is atomic, whether the instruction was locked or not. A load of a locked instruction that writes back
//! what it read needs no action of its own: nobody can tell.

use crate::page::PAGE_SIZE;

/// How many bytes an operation works on.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Width {
    /// One byte.
    One = 1,
    /// Two bytes.
    Two = 2,
    /// Four bytes.
    Four = 4,
    /// Eight bytes.
    Eight = 8,
    /// Sixteen bytes: for [`Action::CompareExchange`] only, as on the CPU.
    Sixteen = 16,
}

impl Width {
    /// The width of so many bytes, if there is one.
    pub fn of(bytes: usize) -> Option<Width> {
        Some(match bytes {
            1 => Width::One,
            2 => Width::Two,
            4 => Width::Four,
            8 => Width::Eight,
            16 => Width::Sixteen,
            _ => return None,
        })
    }

    /// In bytes.
    pub fn bytes(self) -> usize {
        self as usize
    }

    /// The bits that a value of this width may have.
    pub fn mask(self) -> u128 {
        u128::MAX >> (128 - 8 * self.bytes())
    }
}

/// What is done with the bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Action {
    /// They are read.
    Load = 1,
    /// The operand is written; the old bytes are not wanted.
    Store = 2,
    /// The operand is written.
    Exchange = 3,
    /// The operand is written if the bytes are as expected.
    CompareExchange = 4,
    /// The operand is added, what overflows is lost.
    Add = 5,
    /// Bits that the operand has not are cleared.
    And = 6,
    /// Bits that the operand has are set.
    Or = 7,
    /// Bits that the operand has are turned.
    Xor = 8,
    /// The bytes are subtracted from zero.
    Negate = 9,
}

impl Action {
    /// All, in the order of their numbers on the wire, which are these from 1.
    pub const ALL: [Action; 9] = [
        Action::Load,
        Action::Store,
        Action::Exchange,
        Action::CompareExchange,
        Action::Add,
        Action::And,
        Action::Or,
        Action::Xor,
        Action::Negate,
    ];

    /// Whether it may change the bytes.
    pub fn writes(self) -> bool {
        self != Action::Load
    }

    fn has_operand(self) -> bool {
        !matches!(self, Action::Load | Action::Negate)
    }
}

/// An action on the bytes at a place in a page. Each that exists is valid: the operand lies in one
/// page and has no more bits than its width, and what an action does not use is zero.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Operation {
    /// As on the wire, and so that it aligns to nothing.
    operand: [u8; 16],
    expected: [u8; 16],
    offset: u16,
    action: Action,
    width: Width,
}

impl Operation {
    /// An operation at `offset` in the page; `expected` is for [`Action::CompareExchange`]. `None` if it is
    /// not valid.
    pub fn new(
        action: Action,
        width: Width,
        offset: u16,
        operand: u128,
        expected: u128,
    ) -> Option<Operation> {
        let compares = action == Action::CompareExchange;
        // `cmpxchg16b` faults elsewhere than at multiples of 16 (SDM, volume 2).
        let place = match width {
            Width::Sixteen => compares && offset.is_multiple_of(16),
            _ => true,
        };
        let valid = place
            && usize::from(offset) + width.bytes() <= PAGE_SIZE
            && operand & !width.mask() == 0
            && expected & !width.mask() == 0
            && (action.has_operand() || operand == 0)
            && (compares || expected == 0);
        let (operand, expected) = (operand.to_le_bytes(), expected.to_le_bytes());
        valid.then_some(Operation { operand, expected, offset, action, width })
    }

    /// What is done.
    pub fn action(&self) -> Action {
        self.action
    }

    /// On how many bytes.
    pub fn width(&self) -> Width {
        self.width
    }

    /// Where in the page.
    pub fn offset(&self) -> u16 {
        self.offset
    }

    /// With what.
    pub fn operand(&self) -> u128 {
        u128::from_le_bytes(self.operand)
    }

    /// What a comparison expects.
    pub fn expected(&self) -> u128 {
        u128::from_le_bytes(self.expected)
    }

    /// What the bytes are after the operation, if they were `old`; `None` if it writes nothing. What must be
    /// written, and what the instruction that does it must do.
    pub fn result(&self, old: u128) -> Option<u128> {
        let operand = self.operand();
        let new = match self.action {
            Action::Load => return None,
            Action::Store | Action::Exchange => operand,
            Action::CompareExchange if old == self.expected() => operand,
            Action::CompareExchange => return None,
            Action::Add => old.wrapping_add(operand),
            Action::And => old & operand,
            Action::Or => old | operand,
            Action::Xor => old ^ operand,
            Action::Negate => old.wrapping_neg(),
        };
        Some(new & self.width.mask())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any valid operation.
    pub fn operations() -> impl Strategy<Value = Operation> {
        let width = proptest::sample::select(vec![1usize, 2, 4, 8, 16]);
        (0..Action::ALL.len(), width, 0u16..PAGE_SIZE as u16, any::<u128>(), any::<u128>()).prop_map(
            |(action, width, offset, operand, expected)| {
                let mut action = Action::ALL[action];
                let width = Width::of(width).unwrap();
                if width == Width::Sixteen {
                    action = Action::CompareExchange;
                }
                let offset = offset / width.bytes() as u16 * width.bytes() as u16;
                let operand = if action.has_operand() { operand & width.mask() } else { 0 };
                let expected = if action == Action::CompareExchange { expected & width.mask() } else { 0 };
                Operation::new(action, width, offset, operand, expected).unwrap()
            },
        )
    }

    #[test]
    fn an_operand_beyond_its_page_or_its_width_is_no_operation() {
        let add = |width, offset, operand| Operation::new(Action::Add, width, offset, operand, 0);
        assert!(add(Width::Eight, 4088, u64::MAX.into()).is_some());
        assert!(add(Width::Eight, 4089, 1).is_none());
        assert!(add(Width::One, u16::MAX, 1).is_none());
        assert!(add(Width::Two, 0, 0x1_0000).is_none());
        assert!(add(Width::Sixteen, 0, 1).is_none());
        let swap = |offset| Operation::new(Action::CompareExchange, Width::Sixteen, offset, u128::MAX, 1);
        assert!(swap(4080).is_some() && swap(8).is_none());
        assert!(Operation::new(Action::Load, Width::One, 0, 1, 0).is_none());
        assert!(Operation::new(Action::Store, Width::One, 0, 1, 1).is_none());
    }

    #[test]
    fn results_wrap_at_the_width_and_a_failed_comparison_writes_nothing() {
        let result = |action, operand, expected, old| {
            Operation::new(action, Width::One, 7, operand, expected).unwrap().result(old)
        };
        assert_eq!(result(Action::Add, 0xff, 0, 0), Some(0xff));
        assert_eq!(result(Action::Add, 2, 0, 0xff), Some(1));
        assert_eq!(result(Action::Negate, 0, 0, 1), Some(0xff));
        assert_eq!(result(Action::Xor, 0xff, 0, 0x0f), Some(0xf0));
        assert_eq!(result(Action::And, 0xfe, 0, 0x0f), Some(0x0e));
        assert_eq!(result(Action::Or, 1, 0, 0x0e), Some(0x0f));
        assert_eq!(result(Action::CompareExchange, 9, 5, 5), Some(9));
        assert_eq!(result(Action::CompareExchange, 9, 5, 6), None);
        assert_eq!(result(Action::Exchange, 3, 0, 9), Some(3));
        assert_eq!(result(Action::Load, 0, 0, 9), None);
    }
}
