//! Boot loaders' files: which kernels there are, and the command line of each.
//!
//! - Entries of the Boot Loader Specification (`loader/entries/*.conf`), the newest first: systemd-boot, Fedora.
//! - `grub.cfg`: the menu entry that `set default` names by number, else the first. Only what update-grub and its like
//!   write is understood: no conditions, and variables only if the file itself or grubenv sets them.
//! - `/vmlinuz` and `/initrd.img`, the links that Debian keeps, with the partition itself as the root.

use std::collections::HashMap;

use super::filesystem::FileSystem;

const ENTRIES: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];
const GRUB: [&str; 4] = ["/grub/grub.cfg", "/boot/grub/grub.cfg", "/grub2/grub.cfg", "/boot/grub2/grub.cfg"];
const GRUB_ENVIRONMENT: [&str; 4] =
    ["/grub/grubenv", "/boot/grub/grubenv", "/grub2/grubenv", "/boot/grub2/grubenv"];

/// Something to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The file that names it.
    pub origin: String,
    /// Path of the kernel.
    pub kernel: String,
    /// Paths of the initrds, in order.
    pub initrds: Vec<String>,
    /// The command line.
    pub options: String,
}

/// What a file system offers, best first. `partitioned` and `name` say what its own root device would be.
pub fn entries(system: &FileSystem, partitioned: bool, name: &str) -> Vec<Entry> {
    let variables = GRUB_ENVIRONMENT
        .iter()
        .filter_map(|path| system.read_text(path))
        .flat_map(|text| assignments(&text))
        .collect();
    let mut found = Vec::new();
    for folder in ENTRIES {
        let mut files: Vec<_> =
            system.list(folder).into_iter().filter(|name| name.ends_with(".conf")).collect();
        files.sort_by_key(|name| std::cmp::Reverse(version_key(name)));
        for name in files {
            let path = format!("{folder}/{name}");
            found.extend(system.read_text(&path).and_then(|text| parse_entry(&path, &text, &variables)));
        }
    }
    for path in GRUB {
        found.extend(system.read_text(path).and_then(|text| parse_grub(path, &text, variables.clone())));
    }
    if system.read("/vmlinuz", super::LARGEST).is_some() {
        let number = name.rsplit(' ').next().filter(|_| partitioned).unwrap_or_default();
        let initrd = "/initrd.img";
        let initrds = system.read(initrd, super::LARGEST).map(|_| initrd.to_owned()).into_iter().collect();
        let options = format!("root=/dev/vda{number} ro");
        found.push(Entry { origin: "its name".into(), kernel: "/vmlinuz".into(), initrds, options });
    }
    found
}

type Variables = HashMap<String, String>;

/// Lines `name=value`, as in grubenv.
fn assignments(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).map(|(n, v)| (n.trim().into(), v.into())).collect()
}

/// Orders names with numbers in them: 6.9 before 6.12.
fn version_key(name: &str) -> Vec<(u64, String)> {
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

/// One entry of the Boot Loader Specification.
fn parse_entry(path: &str, text: &str, variables: &Variables) -> Option<Entry> {
    let (mut kernel, mut initrds, mut options) = (None, Vec::new(), Vec::new());
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(char::is_whitespace) else { continue };
        let value = expand(value.trim(), variables);
        match key {
            "linux" => kernel = Some(value),
            // Several on a line are an extension of Fedora's.
            "initrd" => initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" => options.push(value),
            _ => {}
        }
    }
    Some(Entry { origin: path.into(), kernel: kernel?, initrds, options: options.join(" ") })
}

/// The entry of a grub.cfg that starts when nobody chooses.
fn parse_grub(path: &str, text: &str, mut variables: Variables) -> Option<Entry> {
    let mut menu: Vec<Option<Entry>> = Vec::new();
    let mut default = 0;
    for line in text.lines() {
        let words = words(line, &variables);
        let Some((command, rest)) = words.split_first() else { continue };
        match command.as_str() {
            "set" => {
                if let Some((name, value)) = rest.first().and_then(|word| word.split_once('=')) {
                    if name == "default" {
                        default = value.parse().unwrap_or(0);
                    }
                    variables.insert(name.into(), value.into());
                }
            }
            "menuentry" => menu.push(None),
            "linux" | "linux16" | "linuxefi" => {
                let Some((kernel, options)) = rest.split_first() else { continue };
                let entry = Entry {
                    origin: path.into(),
                    kernel: kernel.clone(),
                    initrds: Vec::new(),
                    options: options.join(" "),
                };
                match menu.last_mut() {
                    Some(last) => *last = Some(entry),
                    // Outside of any menu, as in hand-written files.
                    None => menu.push(Some(entry)),
                }
            }
            "initrd" | "initrd16" | "initrdefi" => {
                if let Some(Some(entry)) = menu.last_mut() {
                    entry.initrds.extend(rest.iter().cloned());
                }
            }
            _ => {}
        }
    }
    let chosen = menu.get(default).cloned().flatten();
    chosen.or_else(|| menu.into_iter().flatten().next())
}

/// The words of a line of grub's language: quotes group, `$` names variables, `#` begins a comment.
fn words(line: &str, variables: &Variables) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.trim().chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, Some(q)) if c == q => quote = None,
            ('\\', None | Some('"')) => word.get_or_insert_default().extend(chars.next()),
            ('$', None | Some('"')) => {
                let mut name = String::new();
                let braces = chars.next_if_eq(&'{').is_some();
                while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                    name.push(c);
                }
                if braces {
                    chars.next_if_eq(&'}');
                }
                let value = variables.get(&name).map(String::as_str).unwrap_or_default();
                word.get_or_insert_default().push_str(value);
            }
            ('#', None) if word.is_none() => break,
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words.retain(|word| !word.is_empty());
    words
}

/// Puts variables into a value of a loader entry, where there are no quotes.
fn expand(value: &str, variables: &Variables) -> String {
    value.split_whitespace().flat_map(|word| words(word, variables)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEBIAN: &str = r#"
set default="0"
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
fi
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux $menuentry_id_option 'gnulinux-simple-1' {
	load_video
	search --no-floppy --fs-uuid --set=root 1234
	echo	'Loading Linux 6.12 ...'
	linux	/boot/vmlinuz-6.12 root=PARTUUID=abc ro  consoleblank=0 earlyprintk=ttyS0 "a b"
	echo	'Loading initial ramdisk ...'
	initrd	/boot/early.cpio /boot/initrd.img-6.12
}
submenu 'Advanced options' {
	menuentry 'Debian GNU/Linux, with Linux 6.1' {
		linux	/boot/vmlinuz-6.1 root=PARTUUID=abc ro
		initrd	/boot/initrd.img-6.1
	}
}
"#;

    fn entry(origin: &str, kernel: &str, initrds: &[&str], options: &str) -> Entry {
        let initrds = initrds.iter().map(|path| (*path).to_owned()).collect();
        Entry { origin: origin.into(), kernel: kernel.into(), initrds, options: options.into() }
    }

    #[test]
    fn grub_starts_the_first_entry_unless_told_otherwise() {
        let first = entry(
            "g",
            "/boot/vmlinuz-6.12",
            &["/boot/early.cpio", "/boot/initrd.img-6.12"],
            "root=PARTUUID=abc ro consoleblank=0 earlyprintk=ttyS0 a b",
        );
        assert_eq!(parse_grub("g", DEBIAN, Variables::new()), Some(first.clone()));
        let second = DEBIAN.replace("default=\"0\"", "default=\"1\"");
        let kernel = parse_grub("g", &second, Variables::new()).map(|entry| entry.kernel);
        assert_eq!(kernel.as_deref(), Some("/boot/vmlinuz-6.1"));
        let unknown = DEBIAN.replace("default=\"0\"", "default=\"gnulinux-simple\"");
        assert_eq!(parse_grub("g", &unknown, Variables::new()), Some(first));
        assert_eq!(parse_grub("g", "menuentry 'x' {\n chainloader +1\n}", Variables::new()), None);
    }

    #[test]
    fn variables_that_the_file_sets_are_known() {
        let text = "set root_dev=/dev/vda2\nlinux /k root=$root_dev ${nothing}quiet '$root_dev'\n";
        let found = parse_grub("g", text, Variables::new()).unwrap();
        assert_eq!(found.options, "root=/dev/vda2 quiet $root_dev");
    }

    #[test]
    fn a_loader_entry_is_read_with_the_environments_variables() {
        let text = "title Fedora\nversion 6.9\nlinux /vmlinuz-6.9\ninitrd /initramfs-6.9.img $tuned_initrd\noptions $kernelopts rhgb\n# no\n";
        let variables = assignments("# GRUB Environment Block\nkernelopts=root=/dev/vda3 ro\n####");
        let found = parse_entry("e", text, &variables.into_iter().collect());
        let wanted = entry("e", "/vmlinuz-6.9", &["/initramfs-6.9.img"], "root=/dev/vda3 ro rhgb");
        assert_eq!(found, Some(wanted));
        assert_eq!(parse_entry("e", "title nothing\n", &Variables::new()), None);
    }

    #[test]
    fn newer_versions_come_first() {
        let mut names = ["a-6.9.conf", "a-6.12.conf", "a-5.30.conf"];
        names.sort_by_key(|name| std::cmp::Reverse(version_key(name)));
        assert_eq!(names, ["a-6.12.conf", "a-6.9.conf", "a-5.30.conf"]);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ a-z0-9$'\"\\\\{}#=/\n\t]{0,200}") {
            parse_grub("g", &text, Variables::new());
            parse_entry("e", &text, &Variables::new());
            version_key(&text);
        }
    }
}
