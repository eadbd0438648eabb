//! The floor for RDMA: the programs of the package perftest, run beside us on the same port.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Pause between looks at a running program, and before the server is called again.
const PAUSE: Duration = Duration::from_millis(50);

/// What is run: `ib_send_lat -s 64` and the like.
#[derive(Copy, Clone, Debug)]
pub struct Run<'a> {
    /// The program.
    pub program: &'a str,
    /// The device.
    pub device: &'a str,
    /// The GID's index on RoCE.
    pub gid: Option<u8>,
    /// Bytes of a message.
    pub size: usize,
    /// How many messages or round trips.
    pub count: usize,
    /// Whether to sleep until a completion comes instead of polling.
    pub blocking: bool,
}

/// A latency program's result, in microseconds; half of a round trip, except for reads.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Latency {
    /// The typical time.
    pub typical: f64,
    /// The 99th percentile.
    pub p99: f64,
}

impl Run<'_> {
    /// Runs server and client; what the client says.
    ///
    /// # Errors
    /// The program is missing or fails.
    fn output(&self) -> Result<String> {
        let mut server =
            Ended(self.command().spawn().with_context(|| {
                format!("{} cannot be started: install the package perftest", self.program)
            })?);
        let until = Instant::now() + LIMIT;
        loop {
            let mut client = Ended(self.command().arg("127.0.0.1").stdout(Stdio::piped()).spawn()?);
            while client.0.try_wait()?.is_none() {
                if Instant::now() >= until {
                    bail!("{self:?} did not end within {LIMIT:?}");
                }
                std::thread::sleep(PAUSE);
            }
            let mut text = String::new();
            if let Some(mut out) = client.0.stdout.take() {
                std::io::Read::read_to_string(&mut out, &mut text)?;
            }
            if last_line(&text).is_some() {
                return Ok(text);
            }
            if server.0.try_wait()?.is_some() || Instant::now() >= until {
                bail!("{self:?} measured nothing");
            }
            // The server does not listen yet.
            std::thread::sleep(PAUSE);
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command.args(["-F", "-d", self.device, "-s", &self.size.to_string(), "-n", &self.count.to_string()]);
        if let Some(gid) = self.gid {
            command.args(["-x", &gid.to_string()]);
        }
        if self.blocking {
            command.arg("-e");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs a program of the `_lat` family.
    ///
    /// # Errors
    /// The program is missing or fails.
    pub fn latency(&self) -> Result<Latency> {
        let text = self.output()?;
        latency(&text).with_context(|| format!("{self:?} said what cannot be understood:\n{text}"))
    }

    /// Runs a program of the `_bw` family: microseconds a message.
    ///
    /// # Errors
    /// The program is missing or fails.
    pub fn per_message(&self) -> Result<f64> {
        let text = self.output()?;
        per_message(&text).with_context(|| format!("{self:?} said what cannot be understood:\n{text}"))
    }
}

/// A process that does not outlive this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only if it has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The numbers of the line of results.
fn last_line(text: &str) -> Option<Vec<f64>> {
    let numbers =
        |line: &str| line.split_whitespace().map(|word| word.parse().ok()).collect::<Option<Vec<_>>>();
    text.lines().rev().filter_map(numbers).find(|numbers| numbers.len() >= 4)
}

/// `#bytes #iterations t_min t_max t_typical t_avg t_stdev 99% 99.9%`
fn latency(text: &str) -> Option<Latency> {
    let numbers = last_line(text)?;
    Some(Latency { typical: *numbers.get(4)?, p99: *numbers.get(7)? })
}

/// `#bytes #iterations BW-peak[MiB/sec] BW-average[MiB/sec] MsgRate[Mpps]`
fn per_message(text: &str) -> Option<f64> {
    let numbers = last_line(text)?;
    let (size, average) = (numbers.first()?, numbers.get(3)?);
    (*average > 0.0).then(|| size / (average * 1.048_576))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perftests_lines_are_read() {
        let text = "---\n #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]\n \
                    4096    1000          42.61          22702.12      66.71    \t       941.52      \t2920.13\t\t14835.86 \
                    \t\t22702.12\n-----\n";
        assert_eq!(latency(text), Some(Latency { typical: 66.71, p99: 14835.86 }));
        let text = " #bytes     #iterations    BW peak[MiB/sec]    BW average[MiB/sec]   MsgRate[Mpps]\n 4096       \
                    2000             45.27              25.00  \t\t     0.006228\n---\n";
        let microseconds = per_message(text).unwrap();
        assert!((microseconds - 156.25).abs() < 0.01, "{microseconds}");
        assert_eq!(latency("Couldn't connect to 127.0.0.1:18515\n"), None);
    }
}
