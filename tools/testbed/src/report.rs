//! A guest's reports on its console, as data.
//!
//! The guest's `/init` prints `GESTALT-MARK <event>`, `GESTALT-REPORT <key>=<value>` and `GESTALT-ASK` lines
//! between whatever else appears there.

use std::collections::BTreeMap;

/// One thing that the guest said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// `userspace`, `poweroff` or `reboot` was reached.
    Mark(String),
    /// A fact.
    Fact(String, String),
    /// It waits for an action.
    Ask,
    /// Any other line.
    Text(String),
}

/// Cuts console output into lines and finds the guest's words in them.
#[derive(Default)]
pub struct Console {
    partial: Vec<u8>,
}

impl Console {
    /// Takes bytes as they come; returns the lines that they complete.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<Said> {
        self.partial.extend_from_slice(bytes);
        let Some(end) = self.partial.iter().rposition(|&byte| byte == b'\n') else { return vec![] };
        let rest = self.partial.split_off(end + 1);
        let complete = std::mem::replace(&mut self.partial, rest);
        String::from_utf8_lossy(&complete).lines().map(parse).collect()
    }
}

fn parse(line: &str) -> Said {
    // Terminals send \r\n, and a kernel message may have begun the line.
    let line = line.trim_end_matches('\r');
    if let Some((_, event)) = line.split_once("GESTALT-MARK ") {
        return Said::Mark(event.trim().to_owned());
    }
    if let Some((key, value)) = line.split_once("GESTALT-REPORT ").and_then(|(_, fact)| fact.split_once('='))
    {
        return Said::Fact(key.trim().to_owned(), value.trim().to_owned());
    }
    if line.trim_end().ends_with("GESTALT-ASK") {
        return Said::Ask;
    }
    Said::Text(line.to_owned())
}

/// The facts of a guest, by key.
#[derive(Clone, Debug, Default)]
pub struct Facts(pub BTreeMap<String, String>);

impl Facts {
    /// A fact that is a number.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.parse().ok()
    }

    /// A fact.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_found_however_the_bytes_are_cut() {
        let text = b"[ 0.1] Linux\r\n[ 0.2] GESTALT-MARK userspace\r\nGESTALT-REPORT cpus_online=4\r\nGESTALT-ASK\r\n";
        let expected = [
            Said::Text("[ 0.1] Linux".into()),
            Said::Mark("userspace".into()),
            Said::Fact("cpus_online".into(), "4".into()),
            Said::Ask,
        ];
        for cut in 1..text.len() {
            let mut console = Console::default();
            let said: Vec<Said> = text.chunks(cut).flat_map(|bytes| console.take(bytes)).collect();
            assert_eq!(said, expected);
        }
    }

    #[test]
    fn an_unfinished_line_waits() {
        let mut console = Console::default();
        assert!(console.take(b"GESTALT-REPORT a=").is_empty());
        assert_eq!(console.take(b"1\n"), [Said::Fact("a".into(), "1".into())]);
    }
}
