//! The seed for cloud-init: host name, SSH keys and user data, as a small disk that the guest finds.

use std::path::{Path, PathBuf};

use crate::config::ConfigError;
use crate::config::devices::{DeviceRequest, RequestedKind};

/// The longest host name (RFC 1123).
const LONGEST_NAME: usize = 63;

/// What the guest is to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// Its host name. Default: the machine's name.
    pub hostname: Option<String>,
    /// Files with SSH public keys that may log in as the distribution's default user.
    pub ssh_keys: Vec<PathBuf>,
    /// A file with user data: `#cloud-config`, a script, ...
    pub user_data: Option<PathBuf>,
    /// A file with the network's configuration, version 1 or 2 of cloud-init's; without one, cards ask DHCP.
    pub network_config: Option<PathBuf>,
}

impl Seed {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        *self == Seed::default()
    }

    /// The disk that tells a machine called `machine`; reads the files.
    ///
    /// # Errors
    /// One sentence: what file cannot be read or is not what it should be.
    pub fn request(&self, machine: &str) -> Result<DeviceRequest, ConfigError> {
        let hostname = self.hostname.as_deref().unwrap_or(machine);
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
        if hostname.is_empty() || hostname.len() > LONGEST_NAME || !hostname.bytes().all(plain) {
            return Err(ConfigError(format!(
                "{hostname:?} cannot be a host name: use 1 to {LONGEST_NAME} letters, digits, '-' and '.'"
            )));
        }
        let user_data = self.user_data.as_deref().map(read).transpose()?;
        let user_data = user_data.unwrap_or_else(|| "#cloud-config\n".into());
        let mut keys = Vec::new();
        for path in &self.ssh_keys {
            let text = read(path)?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            let before = keys.len();
            keys.extend(lines.map(str::to_owned));
            if keys.len() == before || text.contains("PRIVATE KEY") {
                return Err(ConfigError(format!(
                    "{} is no SSH public key: name the file that ends in .pub",
                    path.display()
                )));
            }
        }
        let mut meta_data = format!("local-hostname: {hostname}\n");
        if !keys.is_empty() {
            meta_data += "public-keys:\n";
            for key in &keys {
                // A JSON string is a YAML string.
                meta_data += &format!("  - {}\n", serde_json::Value::from(key.as_str()));
            }
        }
        let network_config = self.network_config.as_deref().map(read).transpose()?;
        // What is told again must have a new id, or cloud-init believes that it knows it.
        let network = network_config.as_deref().unwrap_or_default();
        let id = fnv(&[user_data.as_bytes(), meta_data.as_bytes(), network.as_bytes()]);
        let meta_data = format!("instance-id: gestalt-{id:016x}\n{meta_data}");
        Ok(DeviceRequest::new(None, RequestedKind::Seed { user_data, meta_data, network_config }))
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path)
        .map_err(|error| ConfigError(format!("{} cannot be read: {error}", path.display())))
}

/// The 64-bit hash FNV-1a.
pub fn fnv(parts: &[&[u8]]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    parts.iter().copied().flatten().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    fn told(seed: &Seed) -> (String, String) {
        match seed.request("demo").unwrap().kind {
            RequestedKind::Seed { user_data, meta_data, .. } => (user_data, meta_data),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn keys_name_and_user_data_are_told() {
        let (key, data) = (file("# mine\nssh-ed25519 AAAA \"me\"\n"), file("#!/bin/sh\ntrue\n"));
        let seed = Seed {
            hostname: Some("big".into()),
            ssh_keys: vec![key.path().into()],
            user_data: Some(data.path().into()),
            network_config: None,
        };
        let (user_data, meta_data) = told(&seed);
        assert_eq!(user_data, "#!/bin/sh\ntrue\n");
        let (id, rest) = meta_data.split_once('\n').unwrap();
        assert!(id.starts_with("instance-id: gestalt-"));
        assert_eq!(rest, "local-hostname: big\npublic-keys:\n  - \"ssh-ed25519 AAAA \\\"me\\\"\"\n");
        let other = told(&Seed { hostname: Some("small".into()), ..seed });
        assert_ne!(other.1.lines().next(), Some(id), "what is told again has a new id");
    }

    #[test]
    fn a_network_of_its_own_is_told_and_makes_it_a_new_guest() {
        let network = file("version: 2\n");
        let seed = Seed { network_config: Some(network.path().into()), ..Seed::default() };
        assert!(!seed.is_empty());
        match seed.request("demo").unwrap().kind {
            RequestedKind::Seed { network_config, .. } => {
                assert_eq!(network_config.as_deref(), Some("version: 2\n"))
            }
            other => panic!("{other:?}"),
        }
        let id = |seed: &Seed| told(seed).1.lines().next().unwrap().to_owned();
        assert_ne!(
            id(&seed),
            id(&Seed { network_config: None, hostname: Some("demo".into()), ..seed.clone() })
        );
    }

    #[test]
    fn without_a_name_the_machines_is_taken() {
        let seed = Seed { user_data: Some(file("#cloud-config\n").path().into()), ..Seed::default() };
        assert!(seed.request("demo").is_err(), "the file is gone");
        let seed = Seed { hostname: None, ..Seed::default() };
        assert!(seed.is_empty());
        assert!(told(&seed).1.contains("local-hostname: demo\n"));
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let private = file("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n");
        let empty = file("\n");
        for (seed, part) in [
            (Seed { hostname: Some("a b".into()), ..Seed::default() }, "host name"),
            (Seed { ssh_keys: vec!["/nonexistent".into()], ..Seed::default() }, "cannot be read"),
            (Seed { ssh_keys: vec![private.path().into()], ..Seed::default() }, ".pub"),
            (Seed { ssh_keys: vec![empty.path().into()], ..Seed::default() }, ".pub"),
        ] {
            let said = seed.request("demo").unwrap_err().0;
            assert!(said.contains(part), "{said}");
        }
    }
}
