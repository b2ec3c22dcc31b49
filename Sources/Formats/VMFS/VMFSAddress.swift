// Addresses of VMFS: which block, sub-block, pointer block or descriptor a number names, and what else it says.
import Block

/// The item of a resource file that an address names.
struct VMFSItem: Sendable, Equatable {
    /// Which resource file.
    enum Kind: UInt64, Sendable {
        case subBlock = 2
        case pointerBlock = 3
        case descriptor = 4
        case secondPointerBlock = 5
    }
    var kind: Kind
    var cluster: UInt64
    var item: UInt64
}

/// What a block of a file is, according to its address.
enum VMFSBlock: Equatable {
    /// Not there: reads as zeros.
    case hole
    /// Set aside, but never written: reads as zeros, while the LUN still has what was there before.
    case unwritten
    /// Data, from this byte of the volume.
    case data(UInt64)
    /// Nothing that a file's block can be.
    case wrong(Wrong)

    enum Wrong: UInt8 {
        case type, pastEnd, copyOnWrite, partlyZero
    }
}

extension VMFSGeometry {
    /// Says what the address of a file's block means.
    ///
    /// - Parameter index: the number of the block in its file, which a large block needs.
    @inline(__always)
    func block(_ address: UInt64, index: UInt64) -> VMFSBlock {
        if address == 0 { return .hole }
        let type = address & 7
        let start: UInt64
        if isVMFS6 {
            if type == 1 {
                let item = address >> 51
                if item >= blocksPerCluster { return .wrong(.pastEnd) }
                start = (((address >> 15) & 0x7FFF_FFFF) &* blocksPerCluster &+ item) << blockShift
            } else if type == 7 {
                let large = (address >> 15) & 0x7FFF_FFFF
                if large > volumeSize >> largeShift { return .wrong(.pastEnd) }
                start = (large << largeShift) &+ ((index << blockShift) & ((1 << largeShift) &- 1))
            } else {
                return .wrong(.type)
            }
            if start >= volumeSize || blockSize > volumeSize &- start { return .wrong(.pastEnd) }
            if address & 0x20 != 0 { return .wrong(.copyOnWrite) }
            let zeroBits = (address >> 7) & 0xFF
            if zeroBits != 0 {
                // One bit for each part; where the block is one part, any bit is the block's.
                if zeroBits == 0xFF || (type == 1 && zeroGranularity == blockSize) { return .unwritten }
                return .wrong(.partlyZero)
            }
        } else {
            if type != 1 { return .wrong(.type) }
            start = (address >> 6) << blockShift
            if start >= volumeSize || blockSize > volumeSize &- start { return .wrong(.pastEnd) }
            if address & 0x10 != 0 { return .wrong(.copyOnWrite) }
            if address & 0x20 != 0 { return .unwritten }
        }
        return .data(start)
    }

    /// The item of a resource file that an address names; nil when it names none.
    func item(_ address: UInt64) -> VMFSItem? {
        guard let kind = VMFSItem.Kind(rawValue: address & 7) else { return nil }
        switch kind {
        case .descriptor:
            guard address >> 32 == 0 else { return nil }
            return VMFSItem(kind: kind, cluster: (address >> 6) & 0xFFFF, item: address >> 22)
        case .subBlock, .pointerBlock, .secondPointerBlock:
            if isVMFS6 { return VMFSItem(kind: kind, cluster: (address >> 6) & 0xF_FFFF_FFFF, item: address >> 56) }
            var item = (address >> 28) & 15
            if kind == .subBlock, isDense { item |= ((address >> 3) & 3) << 4 }
            return VMFSItem(kind: kind, cluster: (address >> 6) & 0x3F_FFFF, item: item)
        }
    }

    /// Why an address cannot be followed, for people.
    func text(_ wrong: VMFSBlock.Wrong) -> String {
        switch wrong {
        case .type: "is of a kind that data cannot have"
        case .pastEnd: "lies past the volume's end"
        case .copyOnWrite: "is shared copy on write with another file, which is not supported"
        case .partlyZero: "is zeroed in part, which is not supported"
        }
    }
}
