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
        String::from_utf8_lossy(&complete).lines().flat_map(apart).map(parse).collect()
    }
}

/// A line, and the kernel's message that came before its end: a terminal sends the end of a line for itself,
/// and the kernel does not wait for it.
fn apart(line: &str) -> impl Iterator<Item = &str> {
    let message = line.match_indices('[').map(|(at, _)| at).find(|&at| at > 0 && begins_message(&line[at..]));
    let (line, message) = line.split_at(message.unwrap_or(line.len()));
    std::iter::once(line).chain((!message.is_empty()).then_some(message))
}

/// Whether this begins as messages of the kernel do: `[    5.596017] `.
fn begins_message(text: &str) -> bool {
    let stamp = text.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    let parts = stamp.and_then(|(stamp, _)| stamp.trim_start().split_once('.'));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    parts.is_some_and(|(seconds, fraction)| digits(seconds) && digits(fraction) && fraction.len() == 6)
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
    fn a_kernel_message_before_the_end_of_a_line_is_not_of_the_line() {
        let text = b"GESTALT-REPORT node1.cpus=1[   57.718305] hrtimer: interrupt took 133000140 ns\r\n\r\n\
                     GESTALT-REPORT node0.distance=10 [20] [x.y]\r\n";
        let expected = [
            Said::Fact("node1.cpus".into(), "1".into()),
            Said::Text("[   57.718305] hrtimer: interrupt took 133000140 ns".into()),
            Said::Text(String::new()),
            Said::Fact("node0.distance".into(), "10 [20] [x.y]".into()),
        ];
        assert_eq!(Console::default().take(text), expected);
    }

    #[test]
    fn an_unfinished_line_waits() {
        let mut console = Console::default();
        assert!(console.take(b"GESTALT-REPORT a=").is_empty());
        assert_eq!(console.take(b"1\n"), [Said::Fact("a".into(), "1".into())]);
    }
}
