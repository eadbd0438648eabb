//! A general register, or a part of one, as an operand.

use iced_x86::Register;

/// A part of a general register.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) struct Part {
    /// Which register, by its number in encodings.
    number: u8,
    size: Size,
}

#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum Size {
    Low,
    /// Bits 15:8: AH, CH, DH, BH.
    High,
    Word,
    Double,
    Quad,
}

impl Part {
    /// The lowest `bytes` bytes (1, 2, 4 or 8) of a register.
    pub(super) fn low(number: u8, bytes: usize) -> Part {
        let size = match bytes {
            1 => Size::Low,
            2 => Size::Word,
            4 => Size::Double,
            _ => Size::Quad,
        };
        Part { number, size }
    }

    /// The part that a decoded operand names, if it is one of a general register.
    pub(super) fn named(register: Register) -> Option<Part> {
        // The decoder numbers registers of a kind one after the other: AL, CL, DL, BL, AH to BH, SPL to DIL,
        // R8L to R15L, then AX to R15W, EAX to R15D, RAX to R15. A test goes through all of them.
        let at = |first: Register| (register as usize).checked_sub(first as usize).filter(|&n| n < 16);
        let part = |number: usize, size| Some(Part { number: number as u8, size });
        if let Some(n) = (register as usize).checked_sub(Register::AL as usize).filter(|&n| n < 20) {
            return match n {
                0..4 => part(n, Size::Low),
                4..8 => part(n - 4, Size::High),
                _ => part(n - 4, Size::Low),
            };
        }
        if let Some(n) = at(Register::AX) {
            return part(n, Size::Word);
        }
        if let Some(n) = at(Register::EAX) {
            return part(n, Size::Double);
        }
        at(Register::RAX).and_then(|n| part(n, Size::Quad))
    }

    /// Its value.
    pub(super) fn read(self, general: &[u64; 16]) -> u64 {
        let whole = general[usize::from(self.number)];
        match self.size {
            Size::Low => whole & 0xff,
            Size::High => whole >> 8 & 0xff,
            Size::Word => whole & 0xffff,
            Size::Double => whole & 0xffff_ffff,
            Size::Quad => whole,
        }
    }

    /// Puts a value's lowest bits there. As in 64-bit mode, 4 bytes clear the register's upper half, and 1
    /// and 2 bytes leave the rest as it was.
    pub(super) fn write(self, general: &mut [u64; 16], value: u64) {
        let whole = &mut general[usize::from(self.number)];
        *whole = match self.size {
            Size::Low => *whole & !0xff | value & 0xff,
            Size::High => *whole & !0xff00 | (value & 0xff) << 8,
            Size::Word => *whole & !0xffff | value & 0xffff,
            Size::Double => value & 0xffff_ffff,
            Size::Quad => value,
        };
    }

    /// Whether it is 4 bytes long.
    pub(super) fn is_double(self) -> bool {
        self.size == Size::Double
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_general_register_of_the_decoder_is_the_part_of_its_name() {
        let general: [u64; 16] = std::array::from_fn(|n| {
            0x0022_3344_5566_0000 | (n as u64) << 56 | (0x80 + n as u64) << 8 | n as u64
        });
        let word = |n: usize| (0x80 + n as u64) << 8 | n as u64;
        let names = ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"];
        let mut seen = 0;
        for register in Register::values() {
            let expected = match format!("{register:?}").as_str() {
                name @ ("AL" | "CL" | "DL" | "BL") => {
                    names.iter().position(|n| n[..1] == name[..1]).map(|n| n as u64)
                }
                name @ ("AH" | "CH" | "DH" | "BH") => {
                    names.iter().position(|n| n[..1] == name[..1]).map(|n| 0x80 + n as u64)
                }
                name @ ("SPL" | "BPL" | "SIL" | "DIL") => {
                    names.iter().position(|n| *n == &name[..2]).map(|n| n as u64)
                }
                name => {
                    let digits: String = name.chars().skip(1).take_while(char::is_ascii_digit).collect();
                    let number =
                        digits.parse::<usize>().ok().filter(|n| (8..16).contains(n) && name.starts_with('R'));
                    let of = |name: &str| names.iter().position(|n| *n == name);
                    match (number, number.map_or("", |_| &name[1 + digits.len()..])) {
                        (Some(n), "L") => Some(n as u64),
                        (Some(n), "W") => Some(word(n)),
                        (Some(n), "D") => Some(general[n] & 0xffff_ffff),
                        (Some(n), "") => Some(general[n]),
                        _ => match name.split_at(name.len().min(1)) {
                            ("E", rest) => of(rest).map(|n| general[n] & 0xffff_ffff),
                            ("R", rest) => of(rest).map(|n| general[n]),
                            _ => of(name).map(word),
                        },
                    }
                }
            };
            assert_eq!(Part::named(register).map(|part| part.read(&general)), expected, "{register:?}");
            seen += usize::from(expected.is_some());
        }
        assert_eq!(seen, 20 + 3 * 16);
    }
}
