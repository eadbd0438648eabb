//! The choice of measurements: over which transports, waiting in which ways, and how often.

use anyhow::{Result, bail};

use crate::fault_path::command::Polling;

/// What carries the messages.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Net {
    /// TCP on the loopback device, sealed.
    Tcp,
    /// The same in the clear.
    TcpPlain,
    /// TCP sealed, over two rails: frames are kept until they are acknowledged.
    TcpRails,
    /// Queues in memory; all nodes are in one process.
    InProcess,
}

impl Net {
    /// All of them.
    pub const ALL: [Net; 4] = [Net::Tcp, Net::TcpPlain, Net::TcpRails, Net::InProcess];

    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Net::Tcp => "tcp",
            Net::TcpPlain => "tcp plain",
            Net::TcpRails => "tcp rails",
            Net::InProcess => "in process",
        }
    }
}

/// What a command line asks for.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Over what.
    pub nets: Vec<Net>,
    /// Waiting how.
    pub pollings: Vec<Polling>,
    /// How often everything is measured.
    pub rounds: usize,
}

impl Choice {
    /// Reads `[--rounds N] [--tcp] [--tcp-plain] [--tcp-rails] [--in-process] [--busy] [--blocking]`;
    /// everything, three times, unless told otherwise. `None`, with a line that says so, without the
    /// `--bench` that `cargo bench` adds and `cargo test --all-targets` does not.
    ///
    /// # Errors
    /// An argument that is none of these.
    pub fn read(mut arguments: impl Iterator<Item = String>) -> Result<Option<Choice>> {
        let mut choice = Choice { nets: Vec::new(), pollings: Vec::new(), rounds: 3 };
        let mut measure = false;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--rounds" => choice.rounds = arguments.next().unwrap_or_default().parse()?,
                "--tcp" => choice.nets.push(Net::Tcp),
                "--tcp-plain" => choice.nets.push(Net::TcpPlain),
                "--tcp-rails" => choice.nets.push(Net::TcpRails),
                "--in-process" => choice.nets.push(Net::InProcess),
                "--busy" => choice.pollings.push(Polling::Busy),
                "--blocking" => choice.pollings.push(Polling::Blocking),
                "--bench" => measure = true,
                other => {
                    bail!("{other}: expected --rounds N, a transport such as --tcp, --busy or --blocking")
                }
            }
        }
        if !measure {
            println!("nothing is measured without --bench, which `cargo bench` adds");
            return Ok(None);
        }
        if choice.nets.is_empty() {
            choice.nets = Net::ALL.to_vec();
        }
        if choice.pollings.is_empty() {
            choice.pollings = vec![Polling::Busy, Polling::Blocking];
        }
        Ok(Some(choice))
    }
}
