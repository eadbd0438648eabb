//! Carrying out a GRUB script as far as it can be known without its machine.

use std::collections::HashMap;

use super::super::super::limits::{DEEPEST, MOST_ENTRIES, MOST_EXPANSION, MOST_STEPS};
use super::super::{Entry, Loader, NotUnderstood, assignments};
use super::script::{self, Piece, Statement, Word};

/// Commands that change nothing of what is booted; they succeed.
const HARMLESS: &[&str] = &[
    "echo",
    "export",
    "insmod",
    "terminfo",
    "background_color",
    "clear",
    "cat",
    "true",
    ":",
    "save_env",
    "password",
    "password_pbkdf2",
    "keymap",
    "rmmod",
    "lspci",
    "cutmem",
    "increment",
];
/// Commands that change nothing either, and of which nobody can know here whether they succeed.
const UNKNOWABLE: &[&str] = &[
    "loadfont",
    "sleep",
    "keystatus",
    "serial",
    "cpuid",
    "ls",
    "fwsetup",
    "probe",
    "regexp",
    "smbios",
    "getenv",
    "usb_keyboard",
    "terminal_input",
    "terminal_output",
    "background_image",
    "date",
    "hwmatch",
    "play",
    "videoinfo",
    "cmp",
    "rdmsr",
];
/// Commands that load a Linux kernel, and its initrds.
const LINUX: [&str; 4] = ["linux", "linux16", "linuxefi", "linux32"];
const INITRD: [&str; 3] = ["initrd", "initrd16", "initrdefi"];
/// What GRUB defines before it reads a script. As on a BIOS machine, where nothing of firmware is in the
/// menu.
const BUILT_IN: &[(&str, &str)] = &[
    ("grub_platform", "pc"),
    ("grub_cpu", "i386"),
    ("feature_menuentry_id", "y"),
    ("feature_default_font_path", "y"),
    ("feature_timeout_style", "y"),
    ("feature_all_video_module", "y"),
    ("feature_platform_search_hint", "y"),
    ("feature_chainloader_bpb", "y"),
    ("feature_ntldr", "y"),
    ("feature_200_final", "y"),
    ("feature_nativedisk_cmd", "y"),
];
/// Stands for a device that `search` finds: paths on it are looked for on every partition.
const FOUND: &str = "found";
/// Variables of distributions that are often not set at all, and are then nothing.
const OFTEN_UNSET: [&str; 2] = ["tuned_params", "tuned_initrd"];

/// An entry of the menu, or a submenu.
#[derive(Clone, Debug)]
pub struct Item {
    pub title: String,
    pub id: Option<String>,
    pub line: usize,
    /// The entries of a submenu.
    pub submenu: Option<Vec<Item>>,
    /// What an entry does.
    body: Vec<Statement>,
    /// The arguments behind its title, for `$1` and so on: not supported, and so unknown.
    arguments: usize,
}

/// A variable's value; `None` cannot be known.
type Value = Option<String>;

/// A script under way.
pub struct Interpreter<'a> {
    loader: &'a Loader<'a>,
    /// The folder of the script that GRUB began with.
    folder: String,
    variables: HashMap<String, Value>,
    functions: HashMap<String, Vec<Statement>>,
    pub menu: Vec<Item>,
    /// What the environment block says is to be booted once.
    pub once: Option<String>,
    /// Whether `blscfg` was asked for.
    pub uses_loader_entries: bool,
    /// `linux` and `initrd` so far, outside of any entry or of the one that is loaded.
    kernel: Option<(String, Vec<String>)>,
    initrds: Vec<String>,
    steps: u32,
    expanded: usize,
    depth: u32,
    entries: usize,
}

fn wrong(line: usize, what: impl Into<String>) -> NotUnderstood {
    NotUnderstood { line: Some(line), what: what.into() }
}

impl<'a> Interpreter<'a> {
    /// Before the script at `path`.
    pub fn new(loader: &'a Loader<'a>, path: &str) -> Interpreter<'a> {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
        let mut variables: HashMap<String, Value> =
            BUILT_IN.iter().map(|(name, value)| ((*name).into(), Some((*value).into()))).collect();
        for name in ["prefix", "config_directory"] {
            variables.insert(name.into(), Some(folder.clone()));
        }
        variables.insert("root".into(), Some(FOUND.into()));
        Interpreter {
            loader,
            folder,
            variables,
            functions: HashMap::new(),
            menu: Vec::new(),
            once: None,
            uses_loader_entries: false,
            kernel: None,
            initrds: Vec::new(),
            steps: 0,
            expanded: 0,
            depth: 0,
            entries: 0,
        }
    }

    /// A variable's value, `None` if it is not set.
    ///
    /// # Errors
    /// It cannot be known.
    pub fn known(&self, name: &str) -> Result<Option<String>, NotUnderstood> {
        match self.variables.get(name) {
            None => Ok(None),
            Some(Some(value)) => Ok(Some(value.clone())),
            Some(None) => {
                let what = format!("what `{name}` is depends on what only GRUB can know");
                Err(NotUnderstood { line: None, what })
            }
        }
    }

    /// Carries statements out; whether the last succeeded, `None` if that cannot be known.
    pub fn run(&mut self, script: &[Statement]) -> Result<Option<bool>, NotUnderstood> {
        self.depth += 1;
        let mut status = Some(true);
        for statement in script {
            self.steps += 1;
            if self.steps > MOST_STEPS || self.depth > DEEPEST {
                return Err(NotUnderstood { line: None, what: "it does more than any menu needs".into() });
            }
            status = match statement {
                Statement::Function { name, body } => {
                    self.functions.insert(name.clone(), body.clone());
                    Some(true)
                }
                Statement::Loop { line, body } => {
                    self.skip(body, *line)?;
                    None
                }
                Statement::If { line, arms, otherwise } => self.condition(*line, arms, otherwise)?,
                Statement::Command { line, words, block } => self.command(*line, words, block.as_deref())?,
            };
            self.variables.insert("?".into(), status.map(|ok| u8::from(!ok).to_string()));
        }
        self.depth -= 1;
        Ok(status)
    }

    fn condition(
        &mut self,
        line: usize,
        arms: &[(Vec<Statement>, Vec<Statement>)],
        otherwise: &[Statement],
    ) -> Result<Option<bool>, NotUnderstood> {
        for (index, (condition, body)) in arms.iter().enumerate() {
            match self.run(condition)? {
                Some(true) => return self.run(body),
                Some(false) => {}
                None => {
                    for (condition, body) in &arms[index..] {
                        self.skip(condition, line)?;
                        self.skip(body, line)?;
                    }
                    self.skip(otherwise, line)?;
                    return Ok(None);
                }
            }
        }
        self.run(otherwise)
    }

    /// Takes note that nobody can know whether these are carried out: what they set is unknown, and they must
    /// not be part of the menu or of an entry.
    fn skip(&mut self, script: &[Statement], line: usize) -> Result<(), NotUnderstood> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(wrong(line, "it is nested too deeply"));
        }
        for statement in script {
            self.steps += 1;
            match statement {
                Statement::Function { .. } => {
                    return Err(wrong(line, "a function is defined only under a condition"));
                }
                Statement::Loop { body, .. } => self.skip(body, line)?,
                Statement::If { arms, otherwise, .. } => {
                    for (condition, body) in arms {
                        self.skip(condition, line)?;
                        self.skip(body, line)?;
                    }
                    self.skip(otherwise, line)?;
                }
                Statement::Command { line, words, .. } => self.skip_command(*line, words)?,
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn skip_command(&mut self, line: usize, words: &[Word]) -> Result<(), NotUnderstood> {
        let Some(name) = script::plain(&words[0]) else {
            // `a=$b` begins with text.
            let assigned = match words[0].first() {
                Some(Piece::Text(text)) => text.split_once('=').map(|(name, _)| name.to_owned()),
                _ => None,
            };
            let name = assigned.ok_or_else(|| wrong(line, "a command's name depends on a variable"))?;
            self.variables.insert(name, None);
            return Ok(());
        };
        let name = name.to_owned();
        if let Some((variable, _)) = name.split_once('=') {
            self.variables.insert(variable.into(), None);
            return Ok(());
        }
        match name.as_str() {
            "set" | "unset" => {
                for word in &words[1..] {
                    if let Some(Piece::Text(text)) = word.first() {
                        let variable = text.split('=').next().unwrap_or_default();
                        self.variables.insert(variable.into(), None);
                    }
                }
                Ok(())
            }
            "[" | "test" | "search" | "search.fs_uuid" | "search.file" | "search.fs_label" | "load_env"
            | "false" => Ok(()),
            function if self.functions.contains_key(function) => {
                let body = self.functions[function].clone();
                self.skip(&body, line)
            }
            known if HARMLESS.contains(&known) || UNKNOWABLE.contains(&known) => Ok(()),
            other => Err(wrong(
                line,
                format!("whether `{other}` is carried out is something that only GRUB can know"),
            )),
        }
    }

    fn command(
        &mut self,
        line: usize,
        words: &[Word],
        block: Option<&[Statement]>,
    ) -> Result<Option<bool>, NotUnderstood> {
        if let Some(block) = block {
            return self.menu_item(line, words, block);
        }
        // An assignment's value is not split at blanks.
        if let Some((name, value)) = self.assignment(line, &words[0])? {
            self.variables.insert(name, value);
            return Ok(Some(true));
        }
        let mut arguments = Vec::new();
        for word in words {
            arguments.extend(self.expand(line, word)?);
        }
        let Some(name) = arguments.first().cloned() else { return Ok(Some(true)) };
        let name = name.ok_or_else(|| wrong(line, "a command's name cannot be known"))?;
        let rest = &arguments[1..];
        if let Some(body) = self.functions.get(&name).cloned() {
            for (number, argument) in
                (1..10).zip(rest.iter().cloned().chain(std::iter::repeat(Some(String::new()))))
            {
                self.variables.insert(number.to_string(), argument);
            }
            return self.run(&body);
        }
        match name.as_str() {
            "set" => {
                for word in &words[1..] {
                    if let Some((name, value)) = self.assignment(line, word)? {
                        self.variables.insert(name, value);
                    }
                }
                Ok(Some(true))
            }
            "unset" => {
                rest.iter().flatten().for_each(|name| drop(self.variables.remove(name)));
                Ok(Some(true))
            }
            "false" => Ok(Some(false)),
            "[" | "test" => Ok(self.test(rest)),
            "load_env" => {
                self.load_env(rest);
                Ok(Some(true))
            }
            "search" | "search.fs_uuid" | "search.file" | "search.fs_label" => {
                let flag = rest.iter().flatten().find_map(|word| word.strip_prefix("--set="));
                let dotted = name.contains('.').then(|| rest.get(1).cloned().flatten()).flatten();
                let variable = flag.map(str::to_owned).or(dotted).unwrap_or_else(|| "root".into());
                self.variables.insert(variable, Some(FOUND.into()));
                Ok(Some(true))
            }
            "probe" | "regexp" | "smbios" | "getenv" => {
                // Each sets variables that it names, to what only GRUB knows.
                let named = rest.iter().flatten().filter_map(|word| word.rsplit(['=', ':']).next());
                for name in named.map(str::to_owned).collect::<Vec<_>>() {
                    self.variables.insert(name, None);
                }
                Ok(None)
            }
            "source" | "." | "configfile" => self.source(line, rest),
            "blscfg" => {
                self.uses_loader_entries = true;
                self.entries_of_the_specification(line)?;
                Ok(Some(true))
            }
            linux if LINUX.contains(&linux) => {
                let known = self.known_words(line, rest)?;
                let (kernel, options) =
                    known.split_first().ok_or_else(|| wrong(line, "no kernel is named"))?;
                self.kernel = Some((file(kernel, line)?, options.to_vec()));
                self.initrds.clear();
                Ok(Some(true))
            }
            initrd if INITRD.contains(&initrd) => {
                for word in self.known_words(line, rest)? {
                    self.initrds.push(file(&word, line)?);
                }
                Ok(Some(true))
            }
            "boot" => Ok(Some(true)),
            unknowable if UNKNOWABLE.contains(&unknowable) => Ok(None),
            harmless if HARMLESS.contains(&harmless) => Ok(Some(true)),
            "decrement" => Err(wrong(line, "it counts boots, which only GRUB itself can write down")),
            other => Err(wrong(line, format!("the command `{other}` is not known here"))),
        }
    }

    /// `name=value`, its value unsplit.
    fn assignment(&mut self, line: usize, word: &Word) -> Result<Option<(String, Value)>, NotUnderstood> {
        let Some(Piece::Text(first)) = word.first() else { return Ok(None) };
        let Some((name, begin)) = first.split_once('=') else { return Ok(None) };
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Ok(None);
        }
        let mut rest = vec![Piece::Text(begin.into())];
        rest.extend(word[1..].iter().map(|piece| match piece {
            Piece::Variable { name, .. } => Piece::Variable { name: name.clone(), quoted: true },
            text => text.clone(),
        }));
        let name = name.to_owned();
        let value = self.expand(line, &rest)?.pop().unwrap_or_else(|| Some(String::new()));
        Ok(Some((name, value)))
    }

    /// The words that a word becomes; `None` for one that cannot be known.
    fn expand(&mut self, line: usize, word: &Word) -> Result<Vec<Value>, NotUnderstood> {
        let mut words: Vec<Value> = Vec::new();
        let mut current: Option<Value> = None;
        for piece in word {
            match piece {
                Piece::Text(text) => add(&mut current, Some(text)),
                Piece::Variable { name, quoted } => {
                    let value = match self.variables.get(name) {
                        Some(value) => value.clone(),
                        None => Some(String::new()),
                    };
                    self.expanded += value.as_ref().map_or(0, String::len);
                    if self.expanded > MOST_EXPANSION {
                        return Err(wrong(line, "its variables grow beyond all measure"));
                    }
                    match value {
                        Some(value) if !quoted && value.contains(char::is_whitespace) => {
                            if value.starts_with(char::is_whitespace) {
                                words.extend(current.take());
                            }
                            let mut parts = value.split_whitespace().peekable();
                            while let Some(part) = parts.next() {
                                add(&mut current, Some(part));
                                if parts.peek().is_some() || value.ends_with(char::is_whitespace) {
                                    words.extend(current.take());
                                }
                            }
                        }
                        Some(value) if !quoted && value.is_empty() => {}
                        value => add(&mut current, value.as_deref()),
                    }
                }
            }
        }
        words.extend(current);
        Ok(words)
    }

    fn known_words(&self, line: usize, words: &[Value]) -> Result<Vec<String>, NotUnderstood> {
        let known: Option<Vec<String>> = words.iter().cloned().collect();
        known.ok_or_else(|| wrong(line, "what is booted depends on what only GRUB can know"))
    }

    /// `[ ... ]`; `None` if that cannot be known.
    fn test(&self, words: &[Value]) -> Option<bool> {
        let words: Option<Vec<&str>> = words.iter().map(Option::as_deref).collect();
        let words = words?;
        let words = match words.split_last() {
            Some((&"]", rest)) => rest,
            _ => &words[..],
        };
        self.disjunction(words)
    }

    fn disjunction(&self, words: &[&str]) -> Option<bool> {
        // `-o` binds least, then `-a`, then `!`.
        for (operator, stop) in [("-o", true), ("-a", false)] {
            if let Some(at) = words.iter().position(|word| *word == operator) {
                let (left, right) = (self.disjunction(&words[..at]), self.disjunction(&words[at + 1..]));
                return match (left, right) {
                    (Some(value), _) | (_, Some(value)) if value == stop => Some(stop),
                    (Some(_), Some(_)) => Some(!stop),
                    _ => None,
                };
            }
        }
        match words {
            ["!", rest @ ..] => self.disjunction(rest).map(|value| !value),
            [] => Some(false),
            [text] => Some(!text.is_empty()),
            ["-z", text] => Some(text.is_empty()),
            ["-n", text] => Some(!text.is_empty()),
            ["-s", path] => Some(self.loader.system.len_of(local(path)?).is_some_and(|len| len > 0)),
            ["-e" | "-f", path] => {
                let path = local(path)?;
                Some(self.loader.system.len_of(path).is_some() || !self.loader.system.list(path).is_empty())
            }
            ["-d", path] => Some(!self.loader.system.list(local(path)?).is_empty()),
            [a, "=" | "==", b] => Some(a == b),
            [a, "!=", b] => Some(a != b),
            [a, operator, b] => {
                let (a, b) = (a.parse::<i64>().ok()?, b.parse::<i64>().ok()?);
                match *operator {
                    "-eq" => Some(a == b),
                    "-ne" => Some(a != b),
                    "-lt" => Some(a < b),
                    "-le" => Some(a <= b),
                    "-gt" => Some(a > b),
                    "-ge" => Some(a >= b),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// The variables that GRUB's environment block has.
    fn load_env(&mut self, words: &[Value]) {
        let mut words = words.iter().flatten().map(String::as_str);
        let mut path = None;
        let mut names = Vec::new();
        while let Some(word) = words.next() {
            match word.strip_prefix("--file=") {
                Some(file) => path = Some(file),
                None if matches!(word, "-f" | "--file") => path = words.next(),
                None if word.starts_with('-') => {}
                None => names.push(word),
            }
        }
        let folder = format!("{}/grubenv", self.folder);
        let path = path.and_then(local).unwrap_or(&folder);
        let Some(text) = self.loader.read_environment(path) else { return };
        for (name, value) in assignments(&text) {
            if names.is_empty() || names.contains(&name.as_str()) {
                if name == "next_entry" && !value.is_empty() {
                    self.once = Some(value.clone());
                }
                self.variables.insert(name, Some(value));
            }
        }
    }

    fn source(&mut self, line: usize, words: &[Value]) -> Result<Option<bool>, NotUnderstood> {
        let [Some(path)] = words else { return Err(wrong(line, "which file is to be read cannot be known")) };
        let path = local(path).ok_or_else(|| wrong(line, format!("{path} is on another disk")))?;
        match self.loader.system.read_text(path) {
            Some(text) => {
                let script = script::parse(&text).map_err(|error| {
                    let place = error.line.map(|line| format!(" line {line}")).unwrap_or_default();
                    wrong(line, format!("{path}{place}: {}", error.what))
                })?;
                self.run(&script)
            }
            None => Err(wrong(line, format!("{path} cannot be read"))),
        }
    }

    fn menu_item(
        &mut self,
        line: usize,
        words: &[Word],
        block: &[Statement],
    ) -> Result<Option<bool>, NotUnderstood> {
        self.entries += 1;
        if self.entries > MOST_ENTRIES {
            return Err(wrong(line, "its menu has no end"));
        }
        let mut arguments = Vec::new();
        for word in words {
            arguments.extend(self.expand(line, word)?);
        }
        let arguments = self.known_words(line, &arguments)?;
        let (mut title, mut id) = (None, None);
        let mut rest = arguments[1..].iter();
        let mut others = 0;
        while let Some(word) = rest.next() {
            match word.split_once('=') {
                Some(("--id", value)) => id = Some(value.to_owned()),
                _ if word == "--id" => id = rest.next().cloned(),
                _ if matches!(word.as_str(), "--class" | "--users" | "--hotkey" | "--source") => {
                    let _ = rest.next();
                }
                _ if word.starts_with("--") => {}
                _ if title.is_none() => title = Some(word.clone()),
                _ => others += 1,
            }
        }
        let title = title.unwrap_or_default();
        let mut item = Item { title, id, line, submenu: None, body: Vec::new(), arguments: others };
        if arguments[0] == "submenu" {
            let outer = std::mem::take(&mut self.menu);
            // What a submenu sets is its own.
            let variables = self.variables.clone();
            self.run(block)?;
            self.variables = variables;
            item.submenu = Some(std::mem::replace(&mut self.menu, outer));
        } else {
            item.body = block.to_vec();
        }
        self.menu.push(item);
        Ok(Some(true))
    }

    /// The menu that `blscfg` makes, newest entry first.
    fn entries_of_the_specification(&mut self, line: usize) -> Result<(), NotUnderstood> {
        for (name, entry) in self.loader.specification_entries()? {
            let (Some(kernel), true) = (&entry.kernel, entry.for_this_machine()) else { continue };
            let text = |text: &str| text.replace('\n', " ");
            let mut body = format!("linux {} {}\n", text(kernel), text(&entry.options.join(" ")));
            if !entry.initrds.is_empty() {
                body.push_str(&format!("initrd {}\n", text(&entry.initrds.join(" "))));
            }
            let body =
                script::parse(&body).map_err(|error| wrong(line, format!("{name}: {}", error.what)))?;
            let title = entry.title.unwrap_or_else(|| name.clone());
            self.menu.push(Item { title, id: Some(name), line, submenu: None, body, arguments: 0 });
        }
        Ok(())
    }

    /// What an entry of the menu boots.
    pub fn load(&mut self, item: &Item, path: &str) -> Result<Entry, NotUnderstood> {
        if item.arguments > 0 {
            return Err(wrong(item.line, format!("the entry `{}` has arguments", item.title)));
        }
        (self.kernel, self.initrds) = (None, Vec::new());
        self.variables.insert("chosen".into(), Some(item.title.clone()));
        self.check_variables(&item.body)?;
        self.run(&item.body)?;
        let entry = self.loaded(path)?;
        entry.ok_or_else(|| wrong(item.line, format!("the entry `{}` loads no Linux kernel", item.title)))
    }

    /// A variable that nobody has set is nothing to GRUB. In what is booted it is more likely something that
    /// was not understood.
    fn check_variables(&self, body: &[Statement]) -> Result<(), NotUnderstood> {
        for statement in body {
            let Statement::Command { line, words, .. } = statement else { continue };
            let name = script::plain(&words[0]).unwrap_or_default();
            if !LINUX.contains(&name) && !INITRD.contains(&name) {
                continue;
            }
            for piece in words.iter().flatten() {
                let Piece::Variable { name, .. } = piece else { continue };
                let optional = OFTEN_UNSET.contains(&name.as_str()) || name.starts_with("linux_suffix");
                if !self.variables.contains_key(name) && !optional {
                    return Err(wrong(*line, format!("nothing says what `${name}` is")));
                }
            }
        }
        Ok(())
    }

    /// What is booted by a script without a menu.
    pub fn outside_of_the_menu(&mut self, path: &str) -> Result<Option<Entry>, NotUnderstood> {
        self.loaded(path)
    }

    fn loaded(&mut self, path: &str) -> Result<Option<Entry>, NotUnderstood> {
        let Some((kernel, options)) = self.kernel.take() else { return Ok(None) };
        let options = options.iter().map(|option| quote(option)).collect::<Vec<_>>().join(" ");
        let initrds = std::mem::take(&mut self.initrds);
        Ok(Some(Entry { origin: path.into(), kernel, initrds, options, note: None }))
    }
}

/// Adds to a word that may be unknown already.
fn add(word: &mut Option<Value>, more: Option<&str>) {
    match (word.get_or_insert_with(|| Some(String::new())), more) {
        (Some(text), Some(more)) => text.push_str(more),
        (word, _) => *word = None,
    }
}

/// A path without the device before it; `None` if that is another disk's than the one that is searched.
fn local(path: &str) -> Option<&str> {
    let Some(rest) = path.strip_prefix('(') else { return Some(path) };
    let (device, path) = rest.split_once(')')?;
    (device == FOUND || device.starts_with("hd0")).then_some(path)
}

fn file(path: &str, line: usize) -> Result<String, NotUnderstood> {
    let path = local(path).ok_or_else(|| wrong(line, format!("{path} is on another disk")))?;
    Ok(path.to_owned())
}

/// An option as GRUB hands it on (`grub_create_loader_cmdline`): in quotes if it has blanks, so that it stays
/// one.
fn quote(option: &str) -> String {
    let mut quoted = String::new();
    for c in option.chars() {
        if matches!(c, '\\' | '\'' | '"') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    if option.contains(' ') { format!("\"{quoted}\"") } else { quoted }
}
