//! `gestalt key`: makes and shows keys; see [`machine::keys`].

use std::io::Write;
use std::path::PathBuf;

use clap::Subcommand;

use machine::config::units::check_name;
use machine::keys::KeyFile;
use machine::keys::MachineKey;

/// What `gestalt key` does.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a machine's key: copy it to every server of the machine, or give each its node's only
    New {
        /// The file to make
        file: PathBuf,
    },
    /// Make the key of one node from the machine's: with it a server can be that node and no other
    Node {
        /// The machine's key
        machine: PathBuf,
        /// The node's name
        name: String,
        /// The file to make
        file: PathBuf,
    },
    /// Say what a key file is, without its secret
    Show {
        /// The key file
        file: PathBuf,
    },
}

/// Does it; the exit code.
///
/// # Errors
/// One sentence: which file is not as it should be.
pub fn key(command: &KeyCommand) -> anyhow::Result<u8> {
    match command {
        KeyCommand::New { file } => KeyFile::Machine(MachineKey::generate()?).write_new(file)?,
        KeyCommand::Node { machine, name, file } => {
            check_name(name)?;
            let machine = KeyFile::read(machine)?.for_machine()?;
            KeyFile::Node(machine.node(name)?).write_new(file)?;
        }
        KeyCommand::Show { file } => {
            let text = match KeyFile::read(file)? {
                KeyFile::Machine(key) => {
                    let coordinator = key.coordinator(std::iter::empty())?.private.public();
                    format!("machine key\ncoordinator {coordinator}\n")
                }
                KeyFile::Node(key) => format!(
                    "key of node {}\nnode        {}\ncoordinator {}\n",
                    key.name,
                    key.private.public(),
                    key.coordinator
                ),
            };
            // A reader that went away needs no answer.
            let _ = std::io::stdout().write_all(text.as_bytes());
        }
    }
    Ok(0)
}
