//! `gestalt device`: shows and changes the devices of a machine that `gestalt run` holds on this host.

use std::path::absolute;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use crate::operator::{Answer, BalloonState, DeviceState, Request, client, place};
use machine::config::devices::{DeviceRequest, RequestedKind, parse_disk, parse_net};

/// Flags of `gestalt device`.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    #[command(subcommand)]
    command: DeviceCommand,
    /// The machine's name; not needed if this user has one machine here
    #[arg(long, global = true, value_name = "NAME")]
    machine: Option<String>,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// Show all devices
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Add a disk or a network card
    Add(Box<AddArgs>),
    /// Ask the guest to let go of a device, and take it away
    Remove {
        /// Its name
        name: String,
    },
    /// Give a disk or network card other limits or another share, or a balloon another size
    ///
    /// The limits of a disk or network card are iops=NUMBER and bandwidth=SIZE, or none for either; its
    /// share=NUMBER is of what its node's devices may do; and a balloon takes size=SIZE from the guest.
    Set {
        /// Its name
        name: String,
        /// Such as iops=500, bandwidth=none, share=300, size=512M
        #[arg(required = true, value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct AddArgs {
    /// A disk, as `gestalt run --disk` takes it; a path is one of the node's host
    #[arg(long, value_name = "PATH[,KEY=VALUE..]", value_parser = parse_disk)]
    disk: Option<DeviceRequest>,
    /// A network card, as `gestalt run --net` takes it
    #[arg(long, value_name = "tap=NAME[,KEY=VALUE..]", value_parser = parse_net)]
    net: Option<DeviceRequest>,
}

/// Does what is asked; the exit code.
///
/// # Errors
/// There is no such machine, or it says why not.
pub fn device(args: &DeviceArgs) -> anyhow::Result<u8> {
    let request = args.command.request()?;
    match client::ask(&place::folder(), args.machine.as_deref(), &request)? {
        Answer::Done(what) => println!("{what}"),
        Answer::Refused(why) => bail!(why),
        Answer::Devices(devices) if matches!(args.command, DeviceCommand::List { json: true }) => {
            println!("{}", serde_json::to_string_pretty(&devices)?);
        }
        Answer::Devices(devices) => print!("{}", table(&devices)),
    }
    Ok(0)
}

impl DeviceCommand {
    fn request(&self) -> anyhow::Result<Request> {
        Ok(match self {
            DeviceCommand::List { .. } => Request::List,
            DeviceCommand::Remove { name } => Request::Remove { name: name.clone() },
            DeviceCommand::Set { name, settings } => {
                Request::Set { name: name.clone(), settings: settings.clone() }
            }
            DeviceCommand::Add(wanted) => {
                let mut device =
                    wanted.disk.clone().or(wanted.net.clone()).context("name a disk or a network card")?;
                if let RequestedKind::Disk { path, .. } = &mut device.kind {
                    // The machine runs in another folder.
                    *path = absolute(&path)?;
                }
                Request::Add { device: Box::new(device) }
            }
        })
    }
}

/// A line for each device, in columns.
fn table(devices: &[DeviceState]) -> String {
    let head =
        ["NAME", "KIND", "NODE", "ADDRESS", "IDENTITY", "IOPS", "BANDWIDTH", "SHARE", "STATE", "BACKEND"];
    let mut rows = vec![head.map(String::from)];
    for device in devices {
        let limit = |limit: Option<u64>| limit.map_or("-".into(), |limit| limit.to_string());
        let text = |text: &String| if text.is_empty() { "-".into() } else { text.clone() };
        rows.push([
            device.name.clone(),
            device.kind.clone(),
            device.node.clone(),
            device.address.clone(),
            text(&device.identity),
            limit(device.limits.iops),
            limit(device.limits.bandwidth),
            limit(device.share.map(u64::from)),
            device.state.clone(),
            device.balloon.as_ref().map_or_else(|| text(&device.backend), balloon),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<_> = (0..head.len()).map(width).collect();
    let line = |row: &[String; 10]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// The memory that a guest has given up.
fn balloon(balloon: &BalloonState) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let given_up = balloon.given_up.map_or("its node does not say what was given up".into(), |given_up| {
        let (inflated, reported) = (mib(given_up.inflated), mib(given_up.reported));
        format!("given {inflated:.1} MiB, reported free {reported:.1} MiB")
    });
    format!("size {:.1} MiB, {given_up}", mib(balloon.size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::config::limits::Limits;
    use machine::control::GivenUp;

    #[test]
    fn devices_stand_in_columns() {
        let device = |name: &str, iops| DeviceState {
            name: name.into(),
            kind: "disk".into(),
            node: "n0".into(),
            address: "0000:00:00.0".into(),
            backend: "/x.img".into(),
            identity: String::new(),
            limits: Limits { iops, bandwidth: None },
            share: None,
            balloon: None,
            state: "present".into(),
        };
        let text = table(&[device("disk0", Some(5)), device("a-long-name", None)]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let at = |line: &str| line.find("disk  ").unwrap();
        assert_eq!(at(lines[1]), at(lines[2]));
        assert!(lines[1].contains(" 5 ") && lines[2].ends_with("/x.img"), "{text}");
    }

    #[test]
    fn a_balloon_is_shown_with_what_the_guest_has_given_up() {
        let given_up = Some(GivenUp { inflated: 3 << 19, reported: 2 << 30 });
        let text = balloon(&BalloonState { size: 64 << 20, given_up });
        assert_eq!(text, "size 64.0 MiB, given 1.5 MiB, reported free 2048.0 MiB");
        assert!(balloon(&BalloonState { size: 0, given_up: None }).contains("does not say"));
    }
}
