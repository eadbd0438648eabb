//! Entries of the Boot Loader Specification (uapi-group.org, "Type #1"): `loader/entries/*.conf`, in the
//! order in which a boot loader shows them.

use std::cmp::Ordering;

use super::super::limits::MOST_ENTRIES;
use super::{Entry, Loader, NotUnderstood};

/// Where entries are.
const FOLDERS: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];
/// What systemd-boot is told.
const CONFIGURATION: &str = "/loader/loader.conf";

/// One entry's file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecificationEntry {
    /// What the menu shows.
    pub title: Option<String>,
    /// Path of the kernel; an entry may start something else.
    pub kernel: Option<String>,
    /// Paths of initrds, in order.
    pub initrds: Vec<String>,
    /// The command line, a line each.
    pub options: Vec<String>,
    architecture: Option<String>,
    sort_key: Option<String>,
    machine_id: String,
    version: String,
    /// Another program that it starts (`efi`, `uki`).
    program: Option<String>,
}

impl SpecificationEntry {
    /// Reads an entry's text.
    pub fn parse(text: &str) -> SpecificationEntry {
        let mut entry = SpecificationEntry::default();
        for line in text.lines() {
            let line = line.trim();
            let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
            let value = value.trim().to_owned();
            match key {
                "title" => entry.title = Some(value),
                "version" => entry.version = value,
                "machine-id" => entry.machine_id = value,
                "sort-key" => entry.sort_key = Some(value),
                "linux" => entry.kernel = Some(value),
                // Several on a line are an extension of Fedora's.
                "initrd" => entry.initrds.extend(value.split_whitespace().map(str::to_owned)),
                "options" => entry.options.push(value),
                "architecture" => entry.architecture = Some(value),
                "efi" | "uki" => entry.program = Some(value),
                _ => {}
            }
        }
        entry
    }

    /// Whether it is for an x86-64 machine.
    pub fn for_this_machine(&self) -> bool {
        self.architecture.as_ref().is_none_or(|name| name.eq_ignore_ascii_case("x64"))
    }

    /// The order of the menu: by sort key where both have one, else the newest version first.
    fn order(a: &(String, Self), b: &(String, Self)) -> Ordering {
        match (&a.1.sort_key, &b.1.sort_key) {
            (Some(x), Some(y)) => {
                let key = x.cmp(y).then_with(|| a.1.machine_id.cmp(&b.1.machine_id));
                key.then_with(|| version_key(&b.1.version).cmp(&version_key(&a.1.version)))
            }
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => Ordering::Equal,
        }
        .then_with(|| version_key(&b.0).cmp(&version_key(&a.0)))
    }
}

impl Loader<'_> {
    /// All entries with their names (without `.conf`), in the order of the menu.
    ///
    /// # Errors
    /// There are more than any menu shows.
    pub fn specification_entries(&self) -> Result<Vec<(String, SpecificationEntry)>, NotUnderstood> {
        let mut entries = Vec::new();
        for folder in FOLDERS {
            for file in self.system.list(folder) {
                let Some(name) = file.strip_suffix(".conf") else { continue };
                let path = format!("{folder}/{file}");
                let text = self
                    .system
                    .read_text(&path)
                    .ok_or_else(|| NotUnderstood { line: None, what: format!("{path} cannot be read") })?;
                entries.push((name.to_owned(), SpecificationEntry::parse(&text)));
            }
        }
        if entries.len() > MOST_ENTRIES {
            return Err(NotUnderstood { line: None, what: "it has more entries than any menu shows".into() });
        }
        entries.sort_by(SpecificationEntry::order);
        Ok(entries)
    }

    /// The entry that systemd-boot starts when nobody chooses; `None` if there are no entries.
    ///
    /// # Errors
    /// Something that the choice depends on is not understood.
    pub fn default_of_the_specification(&self) -> Result<Option<Entry>, NotUnderstood> {
        let refuse = |what: String| Err(NotUnderstood { line: None, what });
        let mut entries = self.specification_entries()?;
        entries.retain(|(_, entry)| entry.for_this_machine());
        if let Some((name, _)) = entries.iter().find(|(name, _)| counts_boots(name)) {
            return refuse(format!(
                "the entry {name} counts its boots, which only its boot loader can write down"
            ));
        }
        let configuration = match self.system.len_of(CONFIGURATION) {
            None => String::new(),
            Some(_) => self.system.read_text(CONFIGURATION).ok_or_else(super::unreadable)?,
        };
        let wanted = setting(&configuration, "default");
        let mut note = None;
        let chosen = match &wanted {
            None => 0,
            Some(pattern) if pattern.starts_with('@') => {
                return refuse(format!(
                    "{CONFIGURATION} says `default {pattern}`, which only firmware with variables remembers"
                ));
            }
            Some(pattern) if pattern.contains(['[', '\\']) => {
                return refuse(format!("{CONFIGURATION} names its default by the pattern {pattern}"));
            }
            Some(pattern) => {
                let named = |name: &str| matches(pattern, name) || matches(pattern, &format!("{name}.conf"));
                entries.iter().position(|(name, _)| named(name)).unwrap_or_else(|| {
                    note = Some(format!(
                        "{CONFIGURATION} names {pattern}, which there is not: the newest is booted"
                    ));
                    0
                })
            }
        };
        let Some((name, entry)) = entries.get(chosen) else { return Ok(None) };
        // Whoever wrote an entry meant it to be booted one day.
        for (other, SpecificationEntry { kernel, .. }) in entries.iter().filter(|(other, _)| other != name) {
            let Some(kernel) = kernel.as_ref().filter(|kernel| !self.has(kernel)) else { continue };
            let lost = format!("the entry {other} names {kernel}, which is not there: {name} is booted");
            note = Some(note.map_or(lost.clone(), |note| format!("{note}; {lost}")));
        }
        let Some(kernel) = entry.kernel.clone() else {
            let program = entry.program.clone().unwrap_or_default();
            return refuse(format!("the entry {name} starts no kernel but the program {program}"));
        };
        let origin = FOLDERS
            .iter()
            .map(|folder| format!("{folder}/{name}.conf"))
            .find(|path| self.system.len_of(path).is_some())
            .unwrap_or_else(|| name.clone());
        // As it is: systemd-boot knows neither quotes nor variables.
        let options = entry.options.join(" ");
        Ok(Some(Entry { origin, kernel, initrds: entry.initrds.clone(), options, note }))
    }
}

/// Whether a name ends in boot counts: `name+3` or `name+2-1`.
fn counts_boots(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    name.rsplit_once('+').is_some_and(|(_, counts)| match counts.split_once('-') {
        Some((left, done)) => digits(left) && digits(done),
        None => digits(counts),
    })
}

/// The last line `key value`.
fn setting(text: &str, key: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
    lines.rfind(|(name, _)| *name == key).map(|(_, value)| value.trim().to_owned())
}

/// Whether a name is of a pattern with `*` and `?`.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // Whether the rest of the name is of the rest of the pattern, for every rest of the name.
    let mut rest: Vec<bool> = (0..=name.len()).map(|at| at == name.len()).collect();
    for &c in pattern.iter().rev() {
        let last = rest.clone();
        for at in (0..=name.len()).rev() {
            let one = at < name.len() && last[at + 1];
            rest[at] = match c {
                '*' => last[at] || (at < name.len() && rest[at + 1]),
                '?' => one,
                c => one && name[at] == c,
            };
        }
    }
    rest[0]
}

/// Orders names with numbers in them: 6.9 before 6.12.
pub(super) fn version_key(name: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (word, after) = rest.split_at(text);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        key.push((0, word.to_owned()));
        key.push((number.parse().unwrap_or(u64::MAX), String::new()));
        rest = after;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions_come_first_and_sort_keys_before_names() {
        let entry = |name: &str, key: Option<&str>, version: &str| {
            let sort_key = key.map(str::to_owned);
            (name.to_owned(), SpecificationEntry { sort_key, version: version.into(), ..Default::default() })
        };
        let mut entries = [
            entry("a-6.9", None, ""),
            entry("a-6.12", None, ""),
            entry("k1", Some("b"), "1"),
            entry("k2", Some("b"), "10"),
            entry("k3", Some("a"), "1"),
        ];
        entries.sort_by(SpecificationEntry::order);
        assert_eq!(entries.map(|(name, _)| name), ["k3", "k2", "k1", "a-6.12", "a-6.9"]);
    }

    #[test]
    fn patterns_and_boot_counts_are_known() {
        for (pattern, name, is) in [
            ("arch-*", "arch-lts", true),
            ("arch-lts.conf", "arch-lts", false),
            ("*", "", true),
            ("a?c*e", "abcde", true),
            ("a?c", "ac", false),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
        assert!(
            counts_boots("x+3") && counts_boots("x+2-1") && !counts_boots("6.1+deb12") && !counts_boots("x")
        );
    }
}
