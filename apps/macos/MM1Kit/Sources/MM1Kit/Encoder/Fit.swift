import Foundation

/// How a picture becomes a square tile, as `image` of a model's config says it.
///
/// Where a picture comes to lie is mm1_mlx/resize.py's, to the pixel, but for models that
/// resample bilinearly, as VeCLIP does, where it may be off by one; how its colours are mixed is
/// not: the runtime draws with Pillow's bicubic filter, an app with its system's.
public struct Fit: Sendable, Hashable, Decodable {
    public enum Kind: String, Sendable, Decodable {
        /// Both sides become the tile's.
        case squash
        /// The shortest edge becomes ``cropFrom``, and the centre is cut out.
        case crop
        /// A square of the mean colour around the picture becomes the tile.
        case pad
    }

    public enum Rounding: String, Sendable, Decodable {
        case down, even
    }

    /// Side of the model's own tile, in pixels.
    public let size: Int
    public let resize: Kind
    /// Of red, green and blue, from 0 to 1.
    public let mean: [Double]
    /// The shortest edge before the cut, nil for ``size``.
    public let cropFrom: Int?
    /// Where a cut begins whose margins cannot be equal.
    public let cropRounding: Rounding

    /// Where a picture comes to lie in a tile, in pixels from its upper left corner. What
    /// reaches over the edge is cut off; what stays free is of the mean colour.
    ///
    /// - Parameters:
    ///   - width: of the picture, in pixels; at least 1.
    ///   - height: likewise.
    ///   - side: of the tile.
    public func place(width: Int, height: Int, in side: Int) -> CGRect {
        switch resize {
        case .squash:
            return CGRect(x: 0, y: 0, width: side, height: side)
        case .crop:
            let short = min(width, height)
            let shortest = cropFrom.map { side * $0 / size } ?? side
            let (wide, high) = (shortest * width / short, shortest * height / short)
            let (x, y) = (margin(wide - side), margin(high - side))
            return CGRect(x: -x, y: -y, width: wide, height: high)
        case .pad:
            let longest = max(width, height)
            let scale = Double(side) / Double(longest)
            // The square is made of whole pixels before it is drawn.
            let (x, y) = ((longest - width) / 2, (longest - height) / 2)
            return CGRect(
                x: Double(x) * scale, y: Double(y) * scale,
                width: Double(width) * scale, height: Double(height) * scale)
        }
    }

    private func margin(_ spare: Int) -> Int {
        switch cropRounding {
        case .down: spare / 2
        case .even: Int((Double(spare) / 2).rounded(.toNearestOrEven))
        }
    }
}

/// A tile's colours from 0 to 1, `[3, S, S]`, of its bytes: red, green, blue and one more.
func planes(_ bytes: [UInt8]) -> [Float] {
    (0..<3).flatMap { colour in
        stride(from: colour, to: bytes.count, by: 4).map { Float(bytes[$0]) / 255 }
    }
}
