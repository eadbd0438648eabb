//! The RDMA ports of this host, and which of them to use.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use nix::ifaddrs::getifaddrs;

use super::RdmaSettings;

/// `ARPHRD_INFINIBAND`, the type of a network interface over InfiniBand (IPoIB).
const IPOIB: &str = "32";

/// A port of an RDMA device, as the kernel shows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RdmaPort {
    /// The device: `mlx5_0`.
    pub device: String,
    /// The port, from 1.
    pub port: u8,
    /// The kernel's word for its state, `ACTIVE` if it can be used.
    pub state: String,
    /// Whether it speaks RoCE on Ethernet, not InfiniBand.
    pub ethernet: bool,
    /// Its speed in Gbit/s; 0 if it is not known.
    pub gigabits: f64,
    /// Its addresses.
    pub gids: Vec<Gid>,
    /// On InfiniBand, whose GIDs are no IP addresses: those of its IPoIB interfaces.
    pub addresses: Vec<IpAddr>,
}

/// One address of a port.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Gid {
    /// Its index in the port's table.
    pub index: u8,
    /// The address.
    pub bytes: [u8; 16],
    /// Whether it is for RoCE version 2, and so can be routed.
    pub v2: bool,
}

impl Gid {
    /// The IP address that it stands for, on RoCE.
    pub fn ip(&self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.bytes);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }

    /// How good it is for RoCE; the least is the best.
    fn rank(&self) -> u8 {
        let link_local = self.bytes[0] == 0xfe && self.bytes[1] & 0xc0 == 0x80;
        match (self.v2, self.ip()) {
            (true, IpAddr::V4(_)) => 0,
            (true, IpAddr::V6(_)) if !link_local => 1,
            (true, _) => 2,
            (false, _) => 3,
        }
    }
}

impl RdmaPort {
    /// Whether it can be used now.
    pub fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }

    /// The best GID for RoCE: version 2, and made of an IPv4 address if there is one.
    pub fn best_gid(&self) -> Option<&Gid> {
        self.gids.iter().min_by_key(|gid| (gid.rank(), gid.index))
    }

    /// Whether this host has that address on it.
    fn has(&self, address: IpAddr) -> bool {
        self.gid_of(address).is_some() || self.addresses.contains(&address)
    }

    fn gid_of(&self, address: IpAddr) -> Option<&Gid> {
        self.gids.iter().find(|gid| gid.v2 && gid.ip() == address)
    }
}

/// The port to use, and the GID on it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) device: String,
    pub(super) port: u8,
    /// RoCE always; InfiniBand only if the settings name one, because a LID suffices inside a subnet.
    pub(super) gid: Option<Gid>,
}

/// Chooses what the settings leave open: an active port, the one that has the address `local` if there is
/// one, else the fastest.
///
/// # Errors
/// Why there is none, as the end of a sentence.
pub(super) fn choose(
    ports: &[RdmaPort],
    settings: &RdmaSettings,
    local: Option<IpAddr>,
) -> Result<Choice, String> {
    let named: Vec<&RdmaPort> = ports
        .iter()
        .filter(|port| settings.device.as_ref().is_none_or(|device| *device == port.device))
        .filter(|port| settings.port.is_none_or(|number| number == port.port))
        .collect();
    if named.is_empty() {
        let wanted = match (&settings.device, settings.port) {
            (None, None) => return Err("this host has no RDMA device: see `rdma link`".into()),
            (Some(device), None) => device.clone(),
            (None, Some(port)) => format!("port {port}"),
            (Some(device), Some(port)) => format!("port {device}/{port}"),
        };
        let there: Vec<String> = ports.iter().map(|port| format!("{}/{}", port.device, port.port)).collect();
        return Err(format!("there is no {wanted}, but {}", there.join(", ")));
    }
    let local = local.filter(|address| !address.is_loopback() && !address.is_unspecified());
    let best = named.iter().filter(|port| port.is_active()).min_by(|a, b| {
        let has = |port: &RdmaPort| local.is_some_and(|address| port.has(address));
        has(b).cmp(&has(a)).then(b.gigabits.total_cmp(&a.gigabits))
    });
    let Some(port) = best else {
        let states: Vec<String> =
            named.iter().map(|port| format!("{}/{} is {}", port.device, port.port, port.state)).collect();
        return Err(format!("no port is active ({}): see its cable and `rdma link`", states.join(", ")));
    };
    let name = format!("{}/{}", port.device, port.port);
    let gid = match settings.gid_index {
        Some(index) => Some(
            port.gids
                .iter()
                .find(|gid| gid.index == index)
                .ok_or_else(|| format!("port {name} has no GID {index}: `ibv_devinfo -v` lists them"))?,
        ),
        None if port.ethernet => Some(
            local
                .and_then(|address| port.gid_of(address))
                .or_else(|| port.best_gid())
                .ok_or_else(|| format!("port {name} has no GID: give its network interface an address"))?,
        ),
        None => None,
    };
    Ok(Choice { device: port.device.clone(), port: port.port, gid: gid.copied() })
}

/// Checks that each rail has a port of its own: `rails` are what [`choose`] is told.
///
/// # Errors
/// Why there is no port, or not one for each, as the end of a sentence.
pub(super) fn distinct(ports: &[RdmaPort], rails: &[(RdmaSettings, Option<IpAddr>)]) -> Result<(), String> {
    let choices = rails.iter().map(|(settings, local)| choose(ports, settings, *local));
    let choices = choices.collect::<Result<Vec<_>, _>>()?;
    for (rail, choice) in choices.iter().enumerate() {
        let same = |other: &Choice| (&other.device, other.port) == (&choice.device, choice.port);
        if let Some(before) = choices[..rail].iter().position(same) {
            return Err(format!(
                "rails {before} and {rail} would both use port {}/{}: each needs a port whose interface has the rail's \
                 address in the machine file",
                choice.device, choice.port
            ));
        }
    }
    Ok(())
}

/// This host's RDMA ports, from /sys/class/infiniband.
pub fn ports() -> Vec<RdmaPort> {
    ports_in(Path::new("/sys/class/infiniband"), &interface_addresses())
}

/// The addresses of this host, each with the name of its interface.
fn interface_addresses() -> Vec<(String, IpAddr)> {
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))?;
        Some((interface.interface_name, ip))
    };
    getifaddrs().into_iter().flatten().filter_map(address).collect()
}

fn ports_in(class: &Path, addresses: &[(String, IpAddr)]) -> Vec<RdmaPort> {
    let mut found = Vec::new();
    for device in names(class) {
        let interfaces = class.join(&device).join("device/net");
        let folder = class.join(&device).join("ports");
        for port in names(&folder) {
            let folder = folder.join(&port);
            let of = |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default().trim().to_owned();
            let Some(number) = port.parse().ok().filter(|number| *number > 0) else { continue };
            let mut gids: Vec<Gid> =
                names(&folder.join("gids")).iter().filter_map(|index| gid(&folder, index)).collect();
            gids.sort_by_key(|gid| gid.index);
            let ours: Vec<String> = names(&interfaces)
                .into_iter()
                .filter(|name| is_ipoib_of(&interfaces.join(name), number))
                .collect();
            let ours = addresses.iter().filter(|(interface, _)| ours.contains(interface));
            found.push(RdmaPort {
                device: device.clone(),
                port: number,
                // `4: ACTIVE`
                state: of("state").split_once(": ").map_or("unknown", |(_, word)| word).to_owned(),
                ethernet: of("link_layer") == "Ethernet",
                // `100 Gb/sec (4X EDR)`
                gigabits: of("rate").split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0),
                gids,
                addresses: ours.map(|(_, address)| *address).collect(),
            });
        }
    }
    found
}

/// Whether a device's network interface is an IPoIB one of port `number`; it counts ports from 0.
fn is_ipoib_of(interface: &Path, number: u8) -> bool {
    let of = |file: &str| fs::read_to_string(interface.join(file)).unwrap_or_default().trim().to_owned();
    of("type") == IPOIB && of("dev_port").parse() == Ok(u32::from(number) - 1)
}

/// Entry `index` of a port's GID table; `None` for one that is empty.
fn gid(port: &Path, index: &str) -> Option<Gid> {
    let text = fs::read_to_string(port.join("gids").join(index)).ok()?;
    let address: Ipv6Addr = text.trim().parse().ok()?;
    // Tables are long and mostly empty; reading the type of an empty entry is an error.
    if address.is_unspecified() {
        return None;
    }
    let kind = fs::read_to_string(port.join("gid_attrs/types").join(index)).ok()?;
    Some(Gid { index: index.parse().ok()?, bytes: address.octets(), v2: kind.trim() == "RoCE v2" })
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn v4(index: u8, last: u8, v2: bool) -> Gid {
        Gid { index, bytes: Ipv4Addr::new(10, 0, 0, last).to_ipv6_mapped().octets(), v2 }
    }

    fn link_local(index: u8) -> Gid {
        Gid { index, bytes: "fe80::1".parse::<Ipv6Addr>().unwrap().octets(), v2: true }
    }

    fn port(device: &str, number: u8, state: &str, gids: Vec<Gid>) -> RdmaPort {
        let (device, state) = (device.into(), state.into());
        let (ethernet, addresses) = (!gids.is_empty(), Vec::new());
        RdmaPort { device, port: number, state, ethernet, gigabits: 100.0, gids, addresses }
    }

    fn settings(device: Option<&str>, port: Option<u8>, gid_index: Option<u8>) -> RdmaSettings {
        RdmaSettings { device: device.map(str::to_owned), port, gid_index, service_level: 0 }
    }

    #[test]
    fn a_routable_ipv4_gid_of_the_fastest_active_port_is_the_default() {
        let mut fast = port("b", 1, "ACTIVE", vec![link_local(0), v4(1, 7, false), v4(2, 7, true)]);
        fast.gigabits = 400.0;
        let ports = [port("a", 1, "ACTIVE", vec![v4(0, 6, true)]), fast, port("c", 1, "DOWN", vec![])];
        let choice = choose(&ports, &RdmaSettings::default(), None).unwrap();
        assert_eq!((choice.device.as_str(), choice.port, choice.gid.unwrap().index), ("b", 1, 2));
    }

    #[test]
    fn the_port_with_the_fabrics_own_address_goes_first() {
        let mut fast = port("b", 1, "ACTIVE", vec![v4(0, 7, true)]);
        fast.gigabits = 400.0;
        let ports = [fast, port("a", 2, "ACTIVE", vec![v4(3, 5, true), v4(5, 6, true)])];
        let choice = choose(&ports, &RdmaSettings::default(), Some("10.0.0.6".parse().unwrap())).unwrap();
        assert_eq!((choice.device.as_str(), choice.port, choice.gid.unwrap().index), ("a", 2, 5));
    }

    #[test]
    fn rails_take_the_ports_that_have_their_addresses_and_never_one_port_twice() {
        let ports =
            [port("a", 1, "ACTIVE", vec![v4(0, 5, true)]), port("a", 2, "ACTIVE", vec![v4(0, 6, true)])];
        let rail = |last| (RdmaSettings::default(), Some(Ipv4Addr::new(10, 0, 0, last).into()));
        assert_eq!(distinct(&ports, &[rail(5), rail(6)]), Ok(()));
        let error = distinct(&ports, &[rail(6), rail(9)]).map(drop);
        assert_eq!(error, Ok(()), "who has an address that is on no port takes what is best");
        let error = distinct(&ports, &[rail(5), rail(9)]).unwrap_err();
        assert!(error.starts_with("rails 0 and 1 would both use port a/1"), "{error}");
    }

    #[test]
    fn infiniband_rails_take_the_ports_whose_ipoib_interfaces_have_their_addresses() {
        let address = |last| IpAddr::from(Ipv4Addr::new(10, 0, 0, last));
        let infiniband = |number, last| RdmaPort {
            ethernet: false,
            addresses: vec![address(last)],
            ..port("a", number, "ACTIVE", vec![link_local(0)])
        };
        let ports = [infiniband(1, 5), infiniband(2, 6)];
        let rail = |last| (RdmaSettings::default(), Some(address(last)));
        assert_eq!(choose(&ports, &RdmaSettings::default(), Some(address(6))).unwrap().port, 2);
        assert_eq!(distinct(&ports, &[rail(6), rail(5)]), Ok(()));
        assert!(distinct(&ports, &[rail(6), rail(6)]).is_err());
    }

    #[test]
    fn infiniband_needs_no_gid_unless_one_is_named() {
        let mut infiniband = port("a", 1, "ACTIVE", vec![link_local(0)]);
        infiniband.ethernet = false;
        let ports = [infiniband];
        assert_eq!(choose(&ports, &RdmaSettings::default(), None).unwrap().gid, None);
        assert_eq!(choose(&ports, &settings(None, None, Some(0)), None).unwrap().gid, Some(link_local(0)));
    }

    #[test]
    fn what_cannot_be_had_is_named() {
        let ports = [port("a", 1, "DOWN", vec![]), port("b", 1, "ACTIVE", vec![v4(0, 7, true)])];
        for (wanted, said) in [
            (settings(Some("a"), None, None), "a/1 is DOWN"),
            (settings(Some("z"), None, None), "there is no z, but a/1, b/1"),
            (settings(Some("b"), Some(2), None), "there is no port b/2"),
            (settings(Some("b"), None, Some(9)), "no GID 9"),
        ] {
            let why = choose(&ports, &wanted, None).unwrap_err();
            assert!(why.contains(said), "{why}");
        }
        assert!(choose(&[], &RdmaSettings::default(), None).unwrap_err().contains("no RDMA device"));
    }

    #[test]
    fn the_kernels_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let port = dir.path().join("mlx5_0/ports/1");
        fs::create_dir_all(port.join("gids")).unwrap();
        fs::create_dir_all(port.join("gid_attrs/types")).unwrap();
        for (file, text) in [
            ("state", "4: ACTIVE\n"),
            ("link_layer", "Ethernet\n"),
            ("rate", "100 Gb/sec (4X EDR)\n"),
            ("gids/0", "fe80:0000:0000:0000:0ca0:92ff:fe4e:2d86\n"),
            ("gids/1", "0000:0000:0000:0000:0000:ffff:0a00:0007\n"),
            ("gids/2", "0000:0000:0000:0000:0000:0000:0000:0000\n"),
            ("gid_attrs/types/0", "IB/RoCE v1\n"),
            ("gid_attrs/types/1", "RoCE v2\n"),
        ] {
            fs::write(port.join(file), text).unwrap();
        }
        // Two IPoIB interfaces, of ports 1 and 2, and one of Ethernet.
        for (interface, kind, dev_port) in
            [("ib0", "32\n", "0\n"), ("ib1", "32\n", "1\n"), ("eth0", "1\n", "0\n")]
        {
            let folder = dir.path().join("mlx5_0/device/net").join(interface);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("type"), kind).unwrap();
            fs::write(folder.join("dev_port"), dev_port).unwrap();
        }
        let address = |last| IpAddr::from(Ipv4Addr::new(10, 0, 0, last));
        let addresses = ["ib0", "ib1", "eth0", "ib0"].map(str::to_owned).into_iter().zip((5..).map(address));
        let found = ports_in(dir.path(), &addresses.collect::<Vec<_>>());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].addresses, [address(5), address(8)]);
        assert!(found[0].is_active() && found[0].ethernet);
        assert_eq!((found[0].device.as_str(), found[0].port, found[0].gigabits), ("mlx5_0", 1, 100.0));
        assert_eq!(found[0].gids.len(), 2);
        assert_eq!(found[0].best_gid(), Some(&v4(1, 7, true)));
    }
}
