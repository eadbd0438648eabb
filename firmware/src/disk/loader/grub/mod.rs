//! grub.cfg: what GRUB would boot when nobody chooses.
//!
//! | file | concept |
//! |---|---|
//! | [`script`] | the language, read into statements |
//! | `run` | carrying them out: variables, conditions, the menu |
//! | this one | the menu's default, and the entry that it names |
//!
//! What cannot be known here (a key that is held down, a disk that GRUB would find) is *unknown*, and so is
//! all that follows from it. As long as the kernel and its command line do not depend on it that is no
//! matter; if they do, the search is refused. Nothing is guessed.

mod run;
pub mod script;

use super::super::limits::MOST_ENTRIES;
use super::{Entry, Loader, NotUnderstood};
use run::{Interpreter, Item};

/// The entry that GRUB starts when nobody chooses, by the script `path`.
///
/// # Errors
/// The script, or something that the choice depends on, is not understood.
pub fn default_entry(loader: &Loader<'_>, path: &str, text: &str) -> Result<Outcome, NotUnderstood> {
    let mut interpreter = Interpreter::new(loader, path);
    interpreter.run(&script::parse(text)?)?;
    let uses_loader_entries = interpreter.uses_loader_entries;
    let titles = titles(&interpreter.menu);
    if interpreter.menu.is_empty() {
        return Ok(Outcome { entry: interpreter.outside_of_the_menu(path)?, titles, uses_loader_entries });
    }
    if let Some(next) = interpreter.once {
        let what = format!("`{next}` is to be booted once, which only GRUB itself can do and then forget");
        return Err(NotUnderstood { line: None, what });
    }
    let default = interpreter.known("default")?.unwrap_or_default();
    let (item, note) = choose(&interpreter.menu, &default)?;
    let item = item.clone();
    let mut entry = interpreter.load(&item, path)?;
    entry.note = note;
    Ok(Outcome { entry: Some(entry), titles, uses_loader_entries })
}

/// What a script comes to.
pub struct Outcome {
    /// The entry that starts when nobody chooses; `None` if the script has none.
    pub entry: Option<Entry>,
    /// The titles of the menu, a submenu's with its own title before them.
    pub titles: Vec<String>,
    /// Whether the menu is made from entries of the Boot Loader Specification.
    pub uses_loader_entries: bool,
}

fn titles(menu: &[Item]) -> Vec<String> {
    let mut titles = Vec::new();
    for item in menu.iter().take(MOST_ENTRIES) {
        match &item.submenu {
            None => titles.push(item.title.clone()),
            Some(inner) => {
                titles.extend(inner.iter().map(|inner| format!("{} > {}", item.title, inner.title)))
            }
        }
    }
    titles
}

/// The entry that `default` names: a number, a title, an identifier, or a path of these with `>` between
/// them. GRUB takes the first entry for what it does not find; so does this, with a note.
fn choose<'a>(menu: &'a [Item], default: &str) -> Result<(&'a Item, Option<String>), NotUnderstood> {
    let (mut level, mut rest) = (menu, default);
    loop {
        let found = find(level, rest);
        let (item, after) = match found {
            Some(found) => found,
            None => (level.first().ok_or_else(empty)?, None),
        };
        let note = (found.is_none() && !rest.is_empty()).then(|| {
            format!("there is no entry `{default}`, which is its default: the first is booted, as by GRUB")
        });
        match (&item.submenu, after) {
            (None, _) => return Ok((item, note)),
            (Some(inner), Some(after)) => (level, rest) = (inner, after),
            (Some(_), None) => {
                let what = format!("its default is the submenu `{}`", item.title);
                return Err(NotUnderstood { line: Some(item.line), what });
            }
        }
    }
}

fn empty() -> NotUnderstood {
    NotUnderstood { line: None, what: "its default is in a menu without entries".into() }
}

/// The entry of this level that the path begins with, and what follows behind `>`.
fn find<'a, 'b>(level: &'a [Item], path: &'b str) -> Option<(&'a Item, Option<&'b str>)> {
    let digits = path.find(|c: char| !c.is_ascii_digit()).unwrap_or(path.len());
    let (number, after) = path.split_at(digits);
    if let Ok(number) = number.parse::<usize>()
        && (after.is_empty() || after.starts_with('>') || after.starts_with(char::is_whitespace))
    {
        return Some((level.get(number)?, after.strip_prefix('>')));
    }
    level.iter().find_map(|item| {
        // A title may have a `>` of its own, which is written twice then.
        let names = [Some(item.title.replace('>', ">>")), item.id.clone()];
        names.into_iter().flatten().find_map(|name| {
            let after = path.strip_prefix(name.as_str())?;
            match after.strip_prefix('>') {
                Some(after) => Some((item, Some(after))),
                None => after.is_empty().then_some((item, None)),
            }
        })
    })
}
