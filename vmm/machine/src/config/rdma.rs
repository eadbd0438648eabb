//! RDMA as a machine's owner asks for it: `fabric = "rdma"`, and the table `[rdma]` of the machine file.
//!
//! ```toml
//! fabric = "rdma"                     # default "tcp"
//!
//! [rdma]                              # all optional: see fabric::rdma::RdmaSettings for what is chosen
//! device = "mlx5_0"
//! port = 1
//! gid_index = 3
//! service_level = 2
//!
//! [rdma.node.n1]                      # what is different at one node
//! device = "mlx5_2"
//! ```

use std::collections::BTreeMap;

use fabric::rdma::RdmaSettings;
use serde::{Deserialize, Serialize};

use crate::config::ConfigError;

/// The carrier of the fabric's frames.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FabricKind {
    /// TCP.
    #[default]
    Tcp,
    /// InfiniBand or RoCE, connected over TCP.
    Rdma,
}

/// The table `[rdma]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaConfig {
    /// For every node.
    pub all: RdmaChoice,
    /// What is different at single nodes, by their names.
    pub node: BTreeMap<String, RdmaChoice>,
}

/// A choice of port, as far as it is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaChoice {
    /// The device.
    pub device: Option<String>,
    /// Its port, from 1.
    pub port: Option<u8>,
    /// Index in the port's GID table.
    pub gid_index: Option<u8>,
    /// InfiniBand service level or RoCE priority, 0 to 15.
    pub service_level: Option<u8>,
}

/// The table's form: serde cannot flatten and refuse unknown keys at once.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RdmaForm {
    device: Option<String>,
    port: Option<u8>,
    gid_index: Option<u8>,
    service_level: Option<u8>,
    #[serde(default)]
    node: BTreeMap<String, ChoiceForm>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChoiceForm {
    device: Option<String>,
    port: Option<u8>,
    gid_index: Option<u8>,
    service_level: Option<u8>,
}

impl From<RdmaForm> for RdmaConfig {
    fn from(form: RdmaForm) -> RdmaConfig {
        let RdmaForm { device, port, gid_index, service_level, node } = form;
        let all = RdmaChoice { device, port, gid_index, service_level };
        let one = |ChoiceForm { device, port, gid_index, service_level }| RdmaChoice {
            device,
            port,
            gid_index,
            service_level,
        };
        RdmaConfig { all, node: node.into_iter().map(|(name, form)| (name, one(form))).collect() }
    }
}

impl RdmaConfig {
    /// Whether it can be meant, for a machine with nodes of these names.
    ///
    /// # Errors
    /// One sentence: what is wrong and what to do.
    pub fn check<'a>(&self, mut names: impl Iterator<Item = &'a str> + Clone) -> Result<(), ConfigError> {
        for (name, choice) in &self.node {
            if !names.clone().any(|known| known == name) {
                return Err(ConfigError(format!(
                    "[rdma.node.{name}] is about a node that does not exist: there are {}",
                    names.by_ref().collect::<Vec<_>>().join(", ")
                )));
            }
            choice.check()?;
        }
        self.all.check()
    }

    /// What the node of this name uses.
    pub fn settings(&self, name: &str) -> RdmaSettings {
        let all = &self.all;
        let own = self.node.get(name).cloned().unwrap_or_default();
        // Ports and GIDs are counted per device.
        let (port, gid_index) = match &own.device {
            Some(_) => (own.port, own.gid_index),
            None => (own.port.or(all.port), own.gid_index.or(all.gid_index)),
        };
        RdmaSettings {
            device: own.device.or_else(|| all.device.clone()),
            port,
            gid_index,
            service_level: own.service_level.or(all.service_level).unwrap_or(0),
        }
    }
}

impl RdmaChoice {
    fn check(&self) -> Result<(), ConfigError> {
        match self.service_level {
            Some(level @ 16..) => {
                Err(ConfigError(format!("the RDMA service level {level} is not possible: choose 0 to 15")))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> RdmaConfig {
        toml::from_str::<RdmaForm>(text).unwrap().into()
    }

    #[test]
    fn a_nodes_own_choice_goes_before_the_common_one() {
        let config = config("device = \"a\"\nport = 2\nservice_level = 3\n[node.n1]\ndevice = \"b\"\n");
        let common =
            RdmaSettings { device: Some("a".into()), port: Some(2), gid_index: None, service_level: 3 };
        assert_eq!(config.settings("n0"), common);
        // The other device's port 2 was not meant.
        assert_eq!(config.settings("n1"), RdmaSettings { device: Some("b".into()), port: None, ..common });
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let names = || ["n0", "n1"].into_iter();
        assert_eq!(config("[node.n1]\nport = 1\n").check(names()), Ok(()));
        let said = config("[node.n7]\nport = 1\n").check(names()).unwrap_err().0;
        assert!(said.contains("n7") && said.contains("n0, n1"), "{said}");
        for text in ["service_level = 16", "[node.n0]\nservice_level = 16"] {
            assert!(config(text).check(names()).unwrap_err().0.contains("0 to 15"));
        }
        assert!(toml::from_str::<RdmaForm>("gid = 3").is_err());
    }
}
