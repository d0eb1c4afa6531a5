//! The table in SPECIFICATION.md.

use anyhow::{Context, ensure};

use super::{ACTS, Cell, SIDES};
use crate::releases::root;

/// What the specification says of a cell: one outcome, or several of which either may come.
pub fn expected(cell: &Cell) -> anyhow::Result<Vec<String>> {
    let path = root().join("SPECIFICATION.md");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let side = SIDES.iter().find(|(_, whom)| *whom == cell.whom);
    let side = side.context("a side")?.0;
    let row = text.lines().find_map(|line| {
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        (columns.get(1) == Some(&cell.point) && columns.get(2) == Some(&side)).then_some(columns)
    });
    let row = row.with_context(|| format!("no row for {cell}"))?;
    ensure!(
        row.len() == 3 + ACTS.len() + 1,
        "a row of another length: {row:?}"
    );
    let column = ACTS.iter().position(|(_, act)| *act == cell.act);
    let says = row[3 + column.context("an act")?];
    Ok(says.split(" or ").map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_has_every_cell() {
        let known = [
            "moved",
            "kept",
            "crashed",
            "moved late",
            "kept late",
            "crashed late",
        ];
        let mut cells = 0;
        for cell in Cell::all() {
            let says = expected(&cell).expect("a row");
            assert!(
                says.iter().all(|word| known.contains(&word.as_str())),
                "{cell}: {says:?}"
            );
            cells += 1;
        }
        assert_eq!(cells, 12 * 3 * 8 - 12 * 2 - 12 - 12);
    }
}
