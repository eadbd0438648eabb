//! Logging in to a guest over ssh, from the host that it runs on, with a key that its seed put there.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::boot::Boot;
use crate::host::{Event, Host};
use crate::proto::Spawn;

/// The private key on the host; the public one has `.pub` behind it.
const KEY: &str = "/tmp/gestalt-login-key";
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(60);
/// Between two attempts, and between two looks at whether the machine still runs.
const PAUSE: Duration = Duration::from_millis(500);

/// User data for a guest that shall start quickly: one kind of host key, and a file system that stays as it
/// is.
const USER_DATA: &str = "#cloud-config\nssh_genkeytypes: [ed25519]\nmanage_etc_hosts: localhost\n\
                         growpart: {mode: off}\nresize_rootfs: false\n";

/// A guest that can be logged in to.
pub struct Login<'a> {
    host: &'a Host,
    /// User and address.
    to: String,
}

/// Makes a key on `host`, and files in `stage`'s `share` from which cloud-init gives network card i the
/// address 10.9.i.2. Returns the flags of `gestalt run` that pass both on.
///
/// # Errors
/// There is no ssh on the host, or no room.
pub fn prepare(host: &Host, stage: &Path, cards: usize) -> Result<Vec<String>> {
    let make = format!("rm -f {KEY} {KEY}.pub && ssh-keygen -q -t ed25519 -N '' -f {KEY}");
    host.output(&make, ATTEMPT).context("making an SSH key")?;
    let mut network = "version: 2\nethernets:\n".to_owned();
    for card in 0..cards {
        network += &format!(
            "  card{card}:\n    match: {{macaddress: \"02:00:00:00:00:{card:02x}\"}}\n    addresses: [10.9.{card}.2/24]\n"
        );
    }
    std::fs::write(stage.join("share/user-data"), USER_DATA)?;
    std::fs::write(stage.join("share/network-config"), network)?;
    let on_host = |name: &str| host.dir().join("share").join(name).display().to_string();
    let flags = [
        ("--ssh-key", format!("{KEY}.pub")),
        ("--user-data", on_host("user-data")),
        ("--network-config", on_host("network-config")),
    ];
    Ok(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect())
}

impl<'a> Login<'a> {
    /// Debian's default user at `address`.
    pub fn new(host: &'a Host, address: &str) -> Self {
        Self { host, to: format!("debian@{address}") }
    }

    /// Tries until it succeeds.
    ///
    /// # Errors
    /// It does not within `limit`, or the machine ends; the error says what ssh said last.
    pub fn wait(&self, boot: &mut Boot, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let mut said = String::new();
            let code = self.run(boot, "true", ATTEMPT, |line| {
                said = line.to_owned();
                Ok(None)
            })?;
            if code == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("nobody can log in within {limit:?}; ssh says {said:?}");
            }
            // The guest is at work meanwhile; its console is read.
            still_runs(boot, PAUSE)?;
        }
    }

    /// Runs a shell command that must succeed; its output.
    ///
    /// # Errors
    /// It does not succeed within `limit`.
    pub fn output(&self, boot: &mut Boot, command: &str, limit: Duration) -> Result<String> {
        let mut output = String::new();
        let code = self.run(boot, command, limit, |line| {
            output += line;
            output.push('\n');
            Ok(None)
        })?;
        if code != 0 {
            bail!("exit code {code} of `{command}` in the guest: {}", output.trim_end());
        }
        Ok(output)
    }

    /// Runs a shell command; its exit code. `line` sees each line of its output and may answer.
    ///
    /// # Errors
    /// It is not through within `limit`, the machine ends, or what `line` says.
    pub fn run(
        &self,
        boot: &mut Boot,
        command: &str,
        limit: Duration,
        mut line: impl FnMut(&str) -> Result<Option<String>>,
    ) -> Result<i32> {
        let options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
                       -o ConnectTimeout=10 -o ServerAliveInterval=20 -o LogLevel=ERROR";
        let mut argv = vec!["ssh".to_owned(), "-i".into(), KEY.into()];
        argv.extend(options.split_whitespace().map(str::to_owned));
        argv.extend([self.to.clone(), command.to_owned()]);
        let job = self.host.spawn(Spawn { argv, ..Spawn::default() })?;
        let deadline = Instant::now() + limit;
        let mut text = String::new();
        while Instant::now() < deadline {
            still_runs(boot, Duration::ZERO)?;
            match job.next_until(deadline.min(Instant::now() + PAUSE))? {
                None => {}
                Some(Event::Exit(code)) => {
                    if !text.is_empty() {
                        line(&text)?;
                    }
                    return Ok(code);
                }
                Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => {
                    text += &String::from_utf8_lossy(&bytes);
                    while let Some((whole, rest)) = text.split_once('\n') {
                        if let Some(answer) = line(whole)? {
                            job.input().send(format!("{answer}\n").as_bytes())?;
                        }
                        text = rest.to_owned();
                    }
                }
            }
        }
        bail!("not finished within {limit:?}: `{command}` in the guest")
    }
}

/// Reads the console for `pause`.
fn still_runs(boot: &mut Boot, pause: Duration) -> Result<()> {
    match boot.wait_end(pause)? {
        None => Ok(()),
        Some(end) => bail!("the machine ended with exit code {:?}", end.code),
    }
}
