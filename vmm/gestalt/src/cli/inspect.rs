//! `gestalt inspect`: what is on a disk, which entries its boot loader has, and what would boot, how, and
//! why.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::Value;

/// Exit code where nothing would boot.
const NOTHING: u8 = 1;

/// Flags of `gestalt inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A raw image, a block device, or a qcow2 image (by its name)
    image: PathBuf,
    /// Say it as JSON: partitions, entries, boots (kernel, initrd, cmdline, from) or null, refused (a
    /// sentence) or null
    #[arg(long)]
    json: bool,
}

/// Arguments of the hidden child.
#[derive(Debug, Args)]
pub struct SearchArgs {
    /// The image's name; the image itself is standard input
    pub image: PathBuf,
    /// Say what is on it instead of what it boots
    #[arg(long)]
    pub survey: bool,
}

/// Shows the survey of a disk; 1 if nothing would boot.
///
/// # Errors
/// The image cannot be opened, or looking into it was ended.
pub fn inspect(args: &InspectArgs) -> anyhow::Result<u8> {
    let text = vmm::disk_search::survey(&args.image)?;
    let survey: Value = serde_json::from_str(&text).context("reading the survey of the disk")?;
    match args.json {
        true => println!("{survey:#}"),
        false => print!("{}", shown(&survey)),
    }
    Ok(if survey["boots"].is_null() { NOTHING } else { 0 })
}

/// The survey for people. Its texts are the guest's word: what a terminal would obey is left out.
fn shown(survey: &Value) -> String {
    let text = |value: &Value| -> String {
        value.as_str().unwrap_or_default().chars().filter(|c| !c.is_control()).collect()
    };
    let list = |key: &str| survey[key].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut lines = Vec::new();
    for part in list("partitions") {
        let mib = part["bytes"].as_u64().unwrap_or(0) >> 20;
        let why = part["why"].as_str().map(|_| format!(": {}", text(&part["why"]))).unwrap_or_default();
        let unread = if part["readable"] == true { "" } else { ", cannot be read here" };
        lines.push(format!(
            "{:<16} {mib:>8} MiB  {}{unread}{why}",
            text(&part["name"]),
            text(&part["content"])
        ));
    }
    for entry in list("entries") {
        lines.push(format!("entry   {} ({})", text(&entry["title"]), text(&entry["partition"])));
    }
    for note in list("notes") {
        lines.push(format!("note    {}", text(note)));
    }
    let boots = &survey["boots"];
    if boots.is_null() {
        lines.push(format!("boots   nothing: {}", text(&survey["refused"])));
    } else {
        lines.push(format!("boots   {}", text(&boots["kernel"])));
        let initrds = boots["initrd"].as_array().map(Vec::as_slice).unwrap_or_default();
        lines.extend(initrds.iter().map(|initrd| format!("initrd  {}", text(initrd))));
        lines.push(format!("cmdline {}", text(&boots["cmdline"])));
        lines.push(format!("by      {}", text(&boots["from"])));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survey_is_shown_line_by_line_and_cannot_steer_the_terminal() {
        let survey = serde_json::json!({
            "partitions": [
                {"name": "partition 1", "bytes": 2 << 20, "content": "FAT", "readable": true, "why": null},
                {"name": "partition 2", "bytes": 9 << 20, "content": "XFS", "readable": false, "why": null},
            ],
            "entries": [{"partition": "partition 1", "title": "Linux\u{1b}[2J"}],
            "notes": [],
            "boots": {"kernel": "partition 1: /k", "initrd": [], "cmdline": "ro", "from": "partition 1: /grub/grub.cfg"},
            "refused": null,
        });
        let text = shown(&survey);
        assert!(text.contains("entry   Linux[2J (partition 1)\n"), "{text}");
        assert!(text.contains("XFS, cannot be read here\n"), "{text}");
        assert!(
            text.ends_with("boots   partition 1: /k\ncmdline ro\nby      partition 1: /grub/grub.cfg\n"),
            "{text}"
        );
    }
}
