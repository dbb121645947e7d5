/// What this package is.
public enum MM1Kit {
    /// The version of mm1-mlx that the package belongs to and is tested with.
    public static let version = "0.1.0"
}
