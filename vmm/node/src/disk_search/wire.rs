//! The answer of a disk search's child process, and its form on the pipe.

use serde::{Deserialize, Serialize};

/// The longest head, in bytes.
pub const LARGEST_HEAD: usize = 256 << 10;
/// The longest survey, in bytes.
pub const LARGEST_SURVEY: u64 = 16 << 20;
/// The longest text in a head, in characters: a command line.
const LONGEST_TEXT: usize = 64 << 10;
/// Notes that are shown.
const MOST_NOTES: usize = 16;

/// The head of an answer; bytes follow.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Head {
    /// What is booted: so many bytes of kernel and then of initrd follow.
    Found {
        /// Where it was found.
        origin: String,
        /// The command line.
        cmdline: String,
        /// What a person should know.
        notes: Vec<String>,
        /// Bytes of the kernel.
        kernel: u64,
        /// Bytes of the initrd, 0 for none.
        initrd: u64,
    },
    /// A survey: so many bytes of JSON follow.
    Survey {
        /// How many.
        bytes: u64,
    },
    /// A sentence that says why there is nothing.
    Refused(String),
}

impl Head {
    /// The same with texts that a terminal and a log can show, none of them too long.
    pub fn printable(self) -> Head {
        match self {
            Head::Found { origin, cmdline, mut notes, kernel, initrd } => {
                notes.truncate(MOST_NOTES);
                let notes = notes.into_iter().map(printable).collect();
                Head::Found { origin: printable(origin), cmdline: printable(cmdline), notes, kernel, initrd }
            }
            Head::Refused(why) => Head::Refused(printable(why)),
            survey => survey,
        }
    }
}

fn printable(text: String) -> String {
    text.chars().take(LONGEST_TEXT).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_child_says_cannot_steer_a_terminal() {
        let head = Head::Refused("a\x1b[2Jb\n".repeat(LONGEST_TEXT));
        let Head::Refused(text) = head.printable() else { panic!("another answer") };
        assert!(text.starts_with("a\u{fffd}[2Jb\u{fffd}a"));
        assert_eq!(text.chars().count(), LONGEST_TEXT);
    }
}
