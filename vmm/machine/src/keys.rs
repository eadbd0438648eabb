//! Keys: how the nodes of a machine and its coordinator know each other.
//!
//! ```text
//! machine key ──derives──> coordinator's key pair
//!  (one secret)  └─────────> key pair of node "n0", of node "n1", ..
//! node key = one node's private key and the coordinator's public key
//! ```
//!
//! `gestalt run` has the machine key: it knows what every node's public key must be, without any list. A node
//! has the machine key too, or, so that no server can pose as another, only its own node key. Without a key
//! file `gestalt run` draws a machine key for the one run and gives the nodes that it starts theirs through a
//! pipe.
//!
//! These keys protect the control connection. Lanes of the fabric have keys of their own, which each node
//! draws afresh for each run and which the coordinator passes around.
//!
//! A key file is one line of text, and must be readable by its owner alone:
//!
//! ```text
//! gestalt-machine-key-1 <64 hex digits: the secret>
//! gestalt-node-key-1 <name> <64 hex digits: private key> <64 hex digits: the coordinator's public key>
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use fabric::secure::{KEY, PrivateKey, PublicKey, SecureError};
use zeroize::Zeroizing;

use crate::config::units::check_name;

const MACHINE: &str = "gestalt-machine-key-1";
const NODE: &str = "gestalt-node-key-1";
/// No key file is longer, in bytes.
const LONGEST: u64 = 4096;

/// What is wrong with a key, in a sentence that says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeyError(pub String);

/// The secret of a machine: who has it can be its coordinator, and any of its nodes.
#[derive(Clone, Debug)]
pub struct MachineKey(PrivateKey);

/// What one node needs to join.
#[derive(Clone, Debug)]
pub struct NodeKey {
    /// The node's name.
    pub name: String,
    /// Its private key.
    pub private: PrivateKey,
    /// Who the coordinator must be.
    pub coordinator: PublicKey,
}

/// What a coordinator needs to know its nodes.
#[derive(Clone, Debug)]
pub struct CoordinatorKeys {
    /// Its private key.
    pub private: PrivateKey,
    /// Names and public keys of the machine's nodes.
    pub nodes: Vec<(String, PublicKey)>,
}

/// What a key file holds.
#[derive(Clone, Debug)]
pub enum KeyFile {
    /// A machine's secret.
    Machine(MachineKey),
    /// One node's key.
    Node(NodeKey),
}

impl MachineKey {
    /// A fresh one.
    ///
    /// # Errors
    /// The system's random number generator fails.
    pub fn generate() -> Result<MachineKey, SecureError> {
        PrivateKey::generate().map(MachineKey)
    }

    /// The key of these bytes, which must be secret and random.
    pub fn from_bytes(bytes: [u8; KEY]) -> MachineKey {
        MachineKey(PrivateKey::from_bytes(bytes))
    }

    /// What the coordinator of a machine with these nodes works with.
    ///
    /// # Errors
    /// As [`PrivateKey::derive`].
    pub fn coordinator<'a>(
        &self,
        nodes: impl Iterator<Item = &'a str>,
    ) -> Result<CoordinatorKeys, SecureError> {
        let nodes = nodes.map(|name| Ok((name.to_owned(), self.private("node", name)?.public())));
        Ok(CoordinatorKeys {
            private: self.private("coordinator", "")?,
            nodes: nodes.collect::<Result<_, _>>()?,
        })
    }

    /// The key of the node of this name.
    ///
    /// # Errors
    /// As [`PrivateKey::derive`].
    pub fn node(&self, name: &str) -> Result<NodeKey, SecureError> {
        let coordinator = self.private("coordinator", "")?.public();
        Ok(NodeKey { name: name.to_owned(), private: self.private("node", name)?, coordinator })
    }

    fn private(&self, role: &str, name: &str) -> Result<PrivateKey, SecureError> {
        self.0.derive(&[b"gestalt ", role.as_bytes(), b" ", name.as_bytes()])
    }
}

impl CoordinatorKeys {
    /// Whose key this is.
    pub fn name_of(&self, key: &PublicKey) -> Option<&str> {
        self.nodes.iter().find(|(_, known)| known == key).map(|(name, _)| name.as_str())
    }
}

impl KeyFile {
    /// Reads a key file.
    ///
    /// # Errors
    /// It cannot be read, others can read it, or it is no key.
    pub fn read(path: &Path) -> Result<KeyFile, KeyError> {
        let at = |what: String| KeyError(format!("the key {}: {what}", path.display()));
        let file = File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                at("there is no such file: make one with `gestalt key new FILE`, or copy the machine's"
                    .into())
            }
            _ => at(format!("it cannot be read: {error}")),
        })?;
        let meta = file.metadata().map_err(|error| at(format!("it cannot be read: {error}")))?;
        if meta.mode() & 0o077 != 0 {
            return Err(at(format!(
                "others than its owner may use it (mode {:o}): `chmod 600` it, and make a new one if it was seen",
                meta.mode() & 0o777
            )));
        }
        if ![0, nix::unistd::geteuid().as_raw()].contains(&meta.uid()) {
            return Err(at(format!("it belongs to user {}, and to neither you nor root", meta.uid())));
        }
        KeyFile::read_from(file).map_err(|error| at(error.0))
    }

    /// Reads a key from a stream, to its end.
    ///
    /// # Errors
    /// What comes is no key.
    pub fn read_from(stream: impl Read) -> Result<KeyFile, KeyError> {
        let mut text = Zeroizing::new(String::new());
        stream
            .take(LONGEST)
            .read_to_string(&mut text)
            .map_err(|error| KeyError(format!("it cannot be read: {error}")))?;
        KeyFile::parse(&text)
    }

    /// Reads the text of a key file.
    ///
    /// # Errors
    /// It is no key.
    pub fn parse(text: &str) -> Result<KeyFile, KeyError> {
        let no_key = || {
            KeyError("it is no key of Gestalt, or one that is damaged: make one with `gestalt key`".into())
        };
        let mut words = text.split_whitespace();
        let file = match (words.next(), words.next(), words.next(), words.next()) {
            (Some(MACHINE), Some(secret), None, None) => {
                KeyFile::Machine(MachineKey(PrivateKey::from_bytes(unhex(secret).ok_or_else(no_key)?)))
            }
            (Some(NODE), Some(name), Some(private), Some(coordinator)) => {
                check_name(name).map_err(|error| KeyError(error.0))?;
                KeyFile::Node(NodeKey {
                    name: name.to_owned(),
                    private: PrivateKey::from_bytes(unhex(private).ok_or_else(no_key)?),
                    coordinator: PublicKey(unhex(coordinator).ok_or_else(no_key)?),
                })
            }
            _ => return Err(no_key()),
        };
        words.next().is_none().then_some(file).ok_or_else(no_key)
    }

    /// The text of the key file.
    pub fn text(&self) -> Zeroizing<String> {
        // The bytes of a private key in hexadecimal.
        let secret = |key: &PrivateKey| Zeroizing::new(PublicKey(*key.bytes()).to_string());
        Zeroizing::new(match self {
            KeyFile::Machine(MachineKey(key)) => format!("{MACHINE} {}\n", *secret(key)),
            KeyFile::Node(key) => {
                format!("{NODE} {} {} {}\n", key.name, *secret(&key.private), key.coordinator)
            }
        })
    }

    /// Writes a new key file that its owner alone may read.
    ///
    /// # Errors
    /// There is such a file already, or it cannot be written.
    pub fn write_new(&self, path: &Path) -> Result<(), KeyError> {
        let at = |error: io::Error| {
            KeyError(match error.kind() {
                io::ErrorKind::AlreadyExists => {
                    format!(
                        "{} exists: a key is never overwritten, so remove it first or choose another name",
                        path.display()
                    )
                }
                _ => format!("the key {} cannot be written: {error}", path.display()),
            })
        };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(at)?;
        file.write_all(self.text().as_bytes()).and_then(|()| file.sync_all()).map_err(at)
    }

    /// The key with which to join as `name`.
    ///
    /// # Errors
    /// It is another node's.
    pub fn for_node(self, name: &str) -> Result<NodeKey, KeyError> {
        match self {
            KeyFile::Machine(key) => key.node(name).map_err(|error| KeyError(error.to_string())),
            KeyFile::Node(key) if key.name == name => Ok(key),
            KeyFile::Node(key) => {
                Err(KeyError(format!("the key is that of node {}, and this is to be node {name}", key.name)))
            }
        }
    }

    /// The key with which to be the coordinator.
    ///
    /// # Errors
    /// It is a node's.
    pub fn for_machine(self) -> Result<MachineKey, KeyError> {
        match self {
            KeyFile::Machine(key) => Ok(key),
            KeyFile::Node(key) => Err(KeyError(format!(
                "the key is that of node {} alone: `gestalt run` needs the machine's (`gestalt key new`)",
                key.name
            ))),
        }
    }
}

fn unhex(text: &str) -> Option<[u8; KEY]> {
    let mut bytes = [0; KEY];
    if text.len() != 2 * KEY || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn machine() -> MachineKey {
        MachineKey::from_bytes([7; KEY])
    }

    #[test]
    fn coordinator_and_nodes_know_each_other_by_the_machine_key() {
        let keys = machine().coordinator(["n0", "n1"].into_iter()).unwrap();
        let node = machine().node("n1").unwrap();
        assert_eq!(keys.name_of(&node.private.public()), Some("n1"));
        assert_eq!(node.coordinator, keys.private.public());
        assert_eq!(keys.name_of(&machine().node("n2").unwrap().private.public()), None);
        let other = MachineKey::from_bytes([8; KEY]).node("n1").unwrap();
        assert_eq!(keys.name_of(&other.private.public()), None);
    }

    #[test]
    fn key_files_are_read_as_they_were_written_and_by_their_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine.key");
        KeyFile::Machine(machine()).write_new(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = KeyFile::read(&path).unwrap().for_machine().unwrap();
        assert_eq!(again.node("a").unwrap().private.bytes(), machine().node("a").unwrap().private.bytes());
        let said = KeyFile::Machine(machine()).write_new(&path).unwrap_err().0;
        assert!(said.contains("never overwritten"), "{said}");
        for open in [0o640, 0o604, 0o610] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(open)).unwrap();
            let said = KeyFile::read(&path).unwrap_err().0;
            assert!(said.contains("machine.key") && said.contains("chmod 600"), "{said}");
        }
        let said = KeyFile::read(&folder.path().join("none")).unwrap_err().0;
        assert!(said.contains("gestalt key new"), "{said}");
    }

    #[test]
    fn a_node_key_is_for_its_node_and_for_nothing_else() {
        let text = KeyFile::Node(machine().node("n1").unwrap()).text();
        let read = || KeyFile::parse(&text).unwrap();
        let key = read().for_node("n1").unwrap();
        assert_eq!(key.private.public(), machine().node("n1").unwrap().private.public());
        assert!(read().for_node("n0").unwrap_err().0.contains("that of node n1"));
        assert!(read().for_machine().unwrap_err().0.contains("node n1 alone"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let good = KeyFile::Machine(machine()).text();
        let digits = "ab".repeat(KEY);
        let node = format!("{NODE} n0 {digits} {digits}");
        assert!(KeyFile::parse(&node).is_ok());
        let cases = [
            String::new(),
            "ssh-ed25519 AAAA".into(),
            good.trim_end()[..good.len() - 2].into(),
            good.replace('0', "g"),
            format!("{} more", good.trim_end()),
            format!("{node} more"),
            node.replace("n0", "n/0"),
            format!("{MACHINE} {}", "é".repeat(KEY)),
        ];
        for text in cases {
            assert!(KeyFile::parse(&text).is_err(), "{text:?}");
        }
    }
}
