//! Which registers are live where a kernel begins: some path reads them before it writes them.

use crate::isa::{Kernel, Op};

/// See [`Kernel::unset`]: from the last block to the first, until nothing changes.
pub fn unset(kernel: &Kernel) -> Option<[Vec<u32>; 2]> {
    let insts = &kernel.insts;
    let falls = |i: usize| {
        let inst = &insts[i];
        let conditional = inst.guard != 0 || inst.guard_flip != 0;
        conditional || !matches!(inst.op, Op::Bra(_) | Op::Brx(_) | Op::Exit | Op::Trap)
    };
    let targets = |i: usize| match &insts[i].op {
        Op::Bra(target) => std::slice::from_ref(target),
        Op::Brx(targets) => targets.as_slice(),
        _ => &[],
    };
    // Where blocks begin, and the block of each instruction.
    let mut begins = vec![false; insts.len() + 1];
    begins[0] = true;
    for (i, inst) in insts.iter().enumerate() {
        match inst.op {
            Op::Call(_) | Op::CopyBack(_) | Op::Ret(_) => return None,
            Op::Bra(_) | Op::Brx(_) | Op::Exit | Op::Trap => begins[i + 1] = true,
            _ => {}
        }
        for &target in targets(i) {
            begins[target as usize] = true;
        }
    }
    begins.pop();
    let firsts: Vec<usize> = (0..insts.len()).filter(|&i| begins[i]).collect();
    let block_of = |i: usize| firsts.partition_point(|&first| first <= i) - 1;

    // What a block reads before it writes it, and what it writes.
    let bits = (kernel.rows[0] + kernel.rows[1]) as usize;
    let len = bits.div_ceil(64);
    let mut live = vec![vec![0u64; len]; firsts.len()];
    let mut written = live.clone();
    // Of one instruction the reads first.
    let mut touches = kernel.touches.clone();
    touches.sort_by_key(|touch| (touch.inst, touch.write));
    for touch in &touches {
        let block = block_of(touch.inst as usize);
        let bit = touch.row as usize + if touch.long { kernel.rows[0] as usize } else { 0 };
        let (word, bit) = (bit / 64, 1 << (bit % 64));
        if touch.write {
            written[block][word] |= bit;
        } else {
            live[block][word] |= bit & !written[block][word];
        }
    }
    let mut changed = true;
    while changed {
        changed = false;
        for block in (0..firsts.len()).rev() {
            let last = firsts.get(block + 1).map_or(insts.len(), |&next| next) - 1;
            let next = (falls(last) && last + 1 < insts.len()).then_some(last + 1);
            let follow: Vec<usize> =
                targets(last).iter().map(|&t| t as usize).chain(next).map(block_of).collect();
            for word in 0..len {
                let behind = follow.iter().fold(0, |all, &next| all | live[next][word]);
                let new = live[block][word] | behind & !written[block][word];
                changed |= new != live[block][word];
                live[block][word] = new;
            }
        }
    }
    let rows = |from: u32, rows: u32| -> Vec<u32> {
        let is_live = |row: &u32| {
            let bit = (from + row) as usize;
            live[0][bit / 64] >> (bit % 64) & 1 == 1
        };
        (0..rows).filter(is_live).collect()
    };
    Some([rows(0, kernel.rows[0]), rows(kernel.rows[0], kernel.rows[1])])
}
