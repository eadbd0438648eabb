//! GRUB's script language, read into statements: words with quotes and variables, blocks, conditions, loops,
//! functions.
//!
//! From the GRUB manual, "Shell-like scripting". What is not part of the language is an error, and no word is
//! dropped.

use super::super::super::limits::DEEPEST;
use super::super::NotUnderstood;

/// One piece of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text as it is.
    Text(String),
    /// A variable's value; outside of quotes its blanks separate words.
    Variable {
        /// Its name.
        name: String,
        /// Whether it stands in double quotes.
        quoted: bool,
    },
}

/// A word: pieces that follow each other without a blank. Quoted text that is empty is a piece.
pub type Word = Vec<Piece>;

/// One statement of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// A command with its arguments, and the block that follows `menuentry` and `submenu`.
    Command {
        /// The line on which it begins, from 1 on.
        line: usize,
        /// The command's name and its arguments; at least one.
        words: Vec<Word>,
        /// What stands in braces behind it.
        block: Option<Vec<Statement>>,
    },
    /// `if`, each `elif`, and `else`.
    If {
        /// The line on which it begins.
        line: usize,
        /// Conditions and what is done where they are the first that is true.
        arms: Vec<(Vec<Statement>, Vec<Statement>)>,
        /// What is done where none is.
        otherwise: Vec<Statement>,
    },
    /// `for`, `while` or `until`.
    Loop {
        /// The line on which it begins.
        line: usize,
        /// What it repeats.
        body: Vec<Statement>,
    },
    /// `function`.
    Function {
        /// Its name.
        name: String,
        /// What it does.
        body: Vec<Statement>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// A newline or a semicolon.
    End,
    Open,
    Close,
}

/// Reads a script.
///
/// # Errors
/// The line that is not understood, and why.
pub fn parse(text: &str) -> Result<Vec<Statement>, NotUnderstood> {
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens: &tokens, at: 0, depth: 0 };
    let script = parser.block(&[])?;
    match parser.peek() {
        None => Ok(script),
        Some(_) => Err(parser.wrong("there is no block that this could end")),
    }
}

struct Parser<'a> {
    tokens: &'a [(usize, Token)],
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(_, token)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(line, _)| *line)
    }

    fn wrong(&self, why: &str) -> NotUnderstood {
        NotUnderstood { line: Some(self.line()), what: why.into() }
    }

    /// The next token if it is a word without quotes and variables.
    fn keyword(&self) -> Option<&str> {
        match self.peek() {
            Some(Token::Word(word)) => plain(word),
            _ => None,
        }
    }

    /// Takes a keyword that must follow.
    fn expect(&mut self, word: &str) -> Result<(), NotUnderstood> {
        if self.keyword() == Some(word) {
            self.at += 1;
            return Ok(());
        }
        Err(self.wrong(&format!("`{word}` is missing")))
    }

    fn skip_ends(&mut self) {
        while self.peek() == Some(&Token::End) {
            self.at += 1;
        }
    }

    /// Statements up to one of these keywords, a closing brace or the end; none of them is taken.
    fn block(&mut self, until: &[&str]) -> Result<Vec<Statement>, NotUnderstood> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(self.wrong("it is nested too deeply"));
        }
        let mut statements = Vec::new();
        loop {
            self.skip_ends();
            match self.peek() {
                None | Some(Token::Close) => break,
                Some(_) if self.keyword().is_some_and(|word| until.contains(&word)) => break,
                Some(_) => statements.push(self.statement()?),
            }
        }
        self.depth -= 1;
        Ok(statements)
    }

    /// A block in braces.
    fn braces(&mut self) -> Result<Vec<Statement>, NotUnderstood> {
        self.skip_ends();
        if self.peek() != Some(&Token::Open) {
            return Err(self.wrong("`{` is missing"));
        }
        self.at += 1;
        let block = self.block(&[])?;
        if self.peek() != Some(&Token::Close) {
            return Err(self.wrong("`}` is missing"));
        }
        self.at += 1;
        Ok(block)
    }

    fn statement(&mut self) -> Result<Statement, NotUnderstood> {
        let line = self.line();
        match self.keyword() {
            Some("if") => self.condition(line),
            Some("for" | "while" | "until") => {
                let words = self.words()?;
                drop(words);
                self.skip_ends();
                self.expect("do")?;
                let body = self.block(&["done"])?;
                self.expect("done")?;
                Ok(Statement::Loop { line, body })
            }
            Some("function") => {
                self.at += 1;
                let name = self.keyword().map(str::to_owned);
                let name = name.ok_or_else(|| self.wrong("a function has no name"))?;
                self.at += 1;
                Ok(Statement::Function { name, body: self.braces()? })
            }
            Some(word @ ("then" | "elif" | "else" | "fi" | "do" | "done" | "in" | "time" | "!")) => {
                let word = word.to_owned();
                Err(self.wrong(&format!("`{word}` does not belong here")))
            }
            _ => {
                let words = self.words()?;
                let takes_block =
                    matches!(words.first().and_then(|word| plain(word)), Some("menuentry" | "submenu"));
                let block = if takes_block { Some(self.braces()?) } else { None };
                if words.is_empty() {
                    return Err(self.wrong("a command is missing"));
                }
                Ok(Statement::Command { line, words, block })
            }
        }
    }

    fn condition(&mut self, line: usize) -> Result<Statement, NotUnderstood> {
        let mut arms = Vec::new();
        let mut otherwise = Vec::new();
        self.expect("if")?;
        loop {
            let condition = self.block(&["then"])?;
            self.expect("then")?;
            arms.push((condition, self.block(&["elif", "else", "fi"])?));
            match self.keyword() {
                Some("elif") => self.at += 1,
                Some("else") => {
                    self.at += 1;
                    otherwise = self.block(&["fi"])?;
                    break;
                }
                _ => break,
            }
        }
        self.expect("fi")?;
        Ok(Statement::If { line, arms, otherwise })
    }

    /// The words up to the end of the command.
    fn words(&mut self) -> Result<Vec<Word>, NotUnderstood> {
        let mut words = Vec::new();
        while let Some(Token::Word(word)) = self.peek() {
            words.push(word.clone());
            self.at += 1;
        }
        Ok(words)
    }
}

/// A word of plain text, without quotes and variables.
pub fn plain(word: &Word) -> Option<&str> {
    match &word[..] {
        [Piece::Text(text)] => Some(text),
        _ => None,
    }
}

/// The words and signs of a script, with their lines.
fn tokens(text: &str) -> Result<Vec<(usize, Token)>, NotUnderstood> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut chars = text.chars().peekable();
    loop {
        let start = line;
        let Some(&c) = chars.peek() else { break };
        match c {
            '\n' | ';' => {
                chars.next();
                tokens.push((line, Token::End));
                line += usize::from(c == '\n');
            }
            c if c.is_whitespace() => drop(chars.next()),
            '#' => while chars.next_if(|c| *c != '\n').is_some() {},
            '{' | '}' => {
                chars.next();
                tokens.push((line, if c == '{' { Token::Open } else { Token::Close }));
            }
            '|' | '&' | '<' | '>' => {
                return Err(NotUnderstood {
                    line: Some(line),
                    what: format!("`{c}` is not part of a command"),
                });
            }
            _ => {
                let word = word(&mut chars, &mut line)?;
                // A continued line by itself is nothing.
                if !word.is_empty() {
                    tokens.push((start, Token::Word(word)));
                }
            }
        }
    }
    Ok(tokens)
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// One word, its quotes resolved.
fn word(chars: &mut Chars<'_>, line: &mut usize) -> Result<Word, NotUnderstood> {
    let mut pieces: Word = Vec::new();
    let begin = *line;
    let unended = || NotUnderstood { line: Some(begin), what: "a quote does not end".into() };
    while let Some(&c) = chars.peek() {
        match c {
            '\'' => {
                chars.next();
                text(&mut pieces, "");
                loop {
                    let c = chars.next().ok_or_else(unended)?;
                    *line += usize::from(c == '\n');
                    if c == '\'' {
                        break;
                    }
                    push(&mut pieces, c);
                }
            }
            '"' => {
                chars.next();
                text(&mut pieces, "");
                loop {
                    let c = chars.next().ok_or_else(unended)?;
                    *line += usize::from(c == '\n');
                    match c {
                        '"' => break,
                        '\\' => match chars.next().ok_or_else(unended)? {
                            '\n' => *line += 1,
                            c @ ('"' | '\\' | '$') => push(&mut pieces, c),
                            c => {
                                push(&mut pieces, '\\');
                                push(&mut pieces, c);
                            }
                        },
                        '$' => variable(chars, true, &mut pieces),
                        c => push(&mut pieces, c),
                    }
                }
            }
            '\\' => {
                chars.next();
                match chars.next() {
                    None => push(&mut pieces, '\\'),
                    Some('\n') => *line += 1,
                    Some(c) => push(&mut pieces, c),
                }
            }
            '$' => {
                chars.next();
                variable(chars, false, &mut pieces);
            }
            '\n' | ';' | '{' | '}' | '|' | '&' | '<' | '>' => break,
            c if c.is_whitespace() => break,
            c => {
                chars.next();
                push(&mut pieces, c);
            }
        }
    }
    Ok(pieces)
}

/// A variable's name behind `$`: `name`, `{name}`, or one of the special ones; a `$` by itself is text.
fn variable(chars: &mut Chars<'_>, quoted: bool, pieces: &mut Word) {
    let braces = chars.next_if_eq(&'{').is_some();
    let mut name = String::new();
    if let Some(special) = chars.next_if(|c| "?@*#".contains(*c)) {
        name.push(special);
    } else {
        while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
            name.push(c);
        }
    }
    if braces {
        chars.next_if_eq(&'}');
    }
    match name.is_empty() {
        true => push(pieces, '$'),
        false => pieces.push(Piece::Variable { name, quoted }),
    }
}

/// Adds text, which may be empty, so that an empty quoted word is one.
fn text(pieces: &mut Word, more: &str) {
    match pieces.last_mut() {
        Some(Piece::Text(text)) => text.push_str(more),
        _ => pieces.push(Piece::Text(more.into())),
    }
}

fn push(pieces: &mut Word, c: char) {
    text(pieces, c.encode_utf8(&mut [0; 4]));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words_of(text: &str) -> Vec<Vec<Word>> {
        let command = |statement| match statement {
            Statement::Command { words, .. } => words,
            other => panic!("{other:?}"),
        };
        parse(text).unwrap().into_iter().map(command).collect()
    }

    fn texts(text: &str) -> Vec<Vec<String>> {
        let text_of = |word: &Word| plain(word).unwrap_or("$").to_owned();
        words_of(text).iter().map(|words| words.iter().map(text_of).collect()).collect()
    }

    #[test]
    fn quotes_group_backslashes_escape_and_lines_continue() {
        assert_eq!(
            texts("a 'b c'\\ d \"e\\\"f\\n\" '' # no\ng"),
            [vec!["a", "b c d", "e\"f\\n", ""], vec!["g"]]
        );
        assert_eq!(
            texts("linux /k root=x \\\n  quiet; initrd /i"),
            [vec!["linux", "/k", "root=x", "quiet"], vec!["initrd", "/i"]]
        );
    }

    #[test]
    fn variables_are_named_with_and_without_braces() {
        let variable = |name: &str, quoted| Piece::Variable { name: name.into(), quoted };
        let text = |text: &str| Piece::Text(text.into());
        let words = words_of("x${a}y$b \"$c d\" $");
        let first = vec![text("x"), variable("a", false), text("y"), variable("b", false)];
        assert_eq!(words, [vec![first, vec![text(""), variable("c", true), text(" d")], vec![text("$")]]]);
    }

    #[test]
    fn conditions_and_menus_nest() {
        let script = parse(
            "if [ a ]; then\n submenu 'x' {\n menuentry y { linux /k }\n }\nelif b; then c\nelse d; fi",
        )
        .unwrap();
        let [Statement::If { arms, otherwise, line: 1 }] = &script[..] else { panic!("{script:?}") };
        assert_eq!((arms.len(), otherwise.len()), (2, 1));
        let Statement::Command { block: Some(inner), line: 2, .. } = &arms[0].1[0] else {
            panic!("{arms:?}")
        };
        assert!(matches!(&inner[0], Statement::Command { block: Some(_), line: 3, .. }));
    }

    #[test]
    fn what_is_not_the_language_is_named_with_its_line() {
        for (text, line) in [
            ("a\nfi", 2),
            ("a\n\n'b", 3),
            ("menuentry x\n{\n a", 3),
            ("a | b", 1),
            ("if a; then b", 1),
            ("a\n}", 2),
        ] {
            assert_eq!(parse(text).unwrap_err().line, Some(line), "{text}");
        }
        let deep = "if a; then ".repeat(1000);
        assert!(parse(&deep).unwrap_err().what.contains("deep"));
    }
}
