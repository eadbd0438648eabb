//! Log lines that a guest or a peer can cause without end: of each kind only so many in a while, and how many
//! were left out.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use base::lock;
use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata};
use tracing_subscriber::layer::{Context, Filter};

/// Lines that one place in the program may write in a [`WHILE`].
const LINES: u32 = 50;
/// The target of lines that the coordinator has for whoever runs the machine, from one place of the program,
/// and of which each counts: what to type on each of many hosts, say.
pub const OPERATOR: &str = "operator";
/// How long they are counted together.
const WHILE: Duration = Duration::from_secs(10);

/// The lines of one place in the program.
struct Count {
    since: Instant,
    lines: u32,
}

/// What is to become of a line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Written,
    /// Written, after so many that were not.
    WrittenAfter(u32),
    /// Left out, as the first of several.
    FirstLeftOut,
    LeftOut,
}

/// The counts, by what tells places apart.
struct Counts<K>(HashMap<K, Count>);

impl<K: std::hash::Hash + Eq> Counts<K> {
    fn line(&mut self, place: K, now: Instant) -> Verdict {
        let count = self.0.entry(place).or_insert(Count { since: now, lines: 0 });
        let before = count.lines;
        if now.saturating_duration_since(count.since) >= WHILE {
            *count = Count { since: now, lines: 1 };
            return match before.saturating_sub(LINES) {
                0 => Verdict::Written,
                left_out => Verdict::WrittenAfter(left_out),
            };
        }
        count.lines = before.saturating_add(1);
        match before {
            0..LINES => Verdict::Written,
            LINES => Verdict::FirstLeftOut,
            _ => Verdict::LeftOut,
        }
    }
}

/// A filter that leaves out what comes too often. Lines for whoever searches for a fault (debug, trace) are
/// not counted.
pub struct LogLimit {
    counts: Mutex<Counts<Identifier>>,
    /// Writes a line about lines.
    say: fn(&str),
}

impl LogLimit {
    /// One that says through `say` what it leaves out.
    pub fn new(say: fn(&str)) -> LogLimit {
        LogLimit { counts: Mutex::new(Counts(HashMap::new())), say }
    }
}

impl<S> Filter<S> for LogLimit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let place = event.metadata();
        if *place.level() > Level::INFO || place.target() == OPERATOR {
            return true;
        }
        let verdict = lock(&self.counts).line(place.callsite(), Instant::now());
        let target = place.target();
        match verdict {
            Verdict::Written => true,
            Verdict::WrittenAfter(left_out) => {
                (self.say)(&format!("({left_out} lines like the next one, from {target}, were left out)"));
                true
            }
            Verdict::FirstLeftOut => {
                (self.say)(&format!(
                    "(lines like the last one, from {target}, come too often: more of them are left out for {} s)",
                    WHILE.as_secs()
                ));
                false
            }
            Verdict::LeftOut => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use tracing_subscriber::layer::{Layer, SubscriberExt};

    use super::*;

    #[test]
    fn of_each_place_so_many_lines_are_written_in_a_while_and_the_others_are_counted() {
        let (mut counts, begin) = (Counts(HashMap::new()), Instant::now());
        for _ in 0..LINES {
            assert_eq!(counts.line(1, begin), Verdict::Written);
        }
        assert_eq!(counts.line(1, begin), Verdict::FirstLeftOut);
        for _ in 0..99 {
            assert_eq!(counts.line(1, begin + WHILE / 2), Verdict::LeftOut);
        }
        assert_eq!(counts.line(2, begin), Verdict::Written, "another place");
        assert_eq!(counts.line(1, begin + WHILE), Verdict::WrittenAfter(100));
        assert_eq!(counts.line(1, begin + 2 * WHILE), Verdict::Written);
    }

    #[test]
    fn what_is_for_the_operator_is_never_cut() {
        let written = Arc::new(Mutex::new(0));
        let counted = written.clone();
        let sink = move || {
            *lock(&counted) += 1;
            io::sink()
        };
        let layer = tracing_subscriber::fmt::layer().with_writer(sink);
        let log = tracing_subscriber::registry().with(layer.with_filter(LogLimit::new(|_| {})));
        tracing::subscriber::with_default(log, || {
            (0..4 * LINES).for_each(|node| tracing::info!(target: OPERATOR, "start node n{node}"));
        });
        assert_eq!(*lock(&written), 4 * LINES);
    }

    #[test]
    fn a_flood_of_lines_is_cut_and_what_is_for_a_search_is_not() {
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = written.clone();
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                lock(&self.0).extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let layer = tracing_subscriber::fmt::layer().with_writer(move || Sink(sink.clone()));
        let log = tracing_subscriber::registry().with(layer.with_filter(LogLimit::new(|_| {})));
        tracing::subscriber::with_default(log, || {
            for number in 0..1000 {
                tracing::warn!("flood {number}");
                tracing::debug!("search {number}");
            }
        });
        let text = String::from_utf8(lock(&written).clone()).unwrap();
        let lines = |word: &str| text.lines().filter(|line| line.contains(word)).count();
        assert_eq!((lines("flood"), lines("search")), (LINES as usize, 1000));
    }
}
